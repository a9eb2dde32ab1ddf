"""Benchmarks, ``python -m fmd_ext.lab.bench``: each op and the whole model against what one would use instead.

A speed is reported only for an output that was compared with plain PyTorch in the same run.
"""
