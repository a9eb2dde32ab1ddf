"""For people who live in inspect_ai (0.3.285 was seen): a model that decodes by any method here, and the benchmarks.

Both are found by the entry point of this package:

    inspect eval fmd_ext/benchmark -T name=avhbench -T data=AVHBench \\
        --model fmd_ext/Qwen/Qwen2.5-Omni-7B -M method=fmd-zero:fork_layers=7
"""
