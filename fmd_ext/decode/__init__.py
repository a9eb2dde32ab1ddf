"""Decoding without overhead: `generate` over static buffers that the device advances, one CUDA graph per shape.

An ordinary decode step makes a plan on the host, copies it to the device, and launches every kernel by itself. Here a
step's inputs (tokens, positions, slots, segments) lie in buffers that stay where they are: running the step advances
them on the device. So a step is the same sequence of launches every time, which on CUDA is captured once and replayed.
"""

from .runner import DecodeRunner

__all__ = ["DecodeRunner"]
