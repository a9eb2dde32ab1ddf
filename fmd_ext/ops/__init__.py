"""The operators: one function per op, every device. Each has a file of its own; `FILES` lists them.

All of them work on a slot pool: K and V of one layer, `[num_kv_heads, num_slots, head_dim]`, in which each sample owns
ranges of slots. `num_qo_heads` is a multiple of `num_kv_heads` (query head h reads kv head `h // heads_per_kv`).
Indices are int64.

An op runs fmd_ext's kernels or torch's own operations, as `fmd_ext.ops.dispatch` decides from device, dtype and
`head_dim`. The kernels take float32, bfloat16 and float16, a `head_dim` that is a multiple of 8, and rows that are
contiguous; attention on CUDA takes bfloat16 and float16 with `head_dim` 64 and 128, and pools whose rows are 16-byte
aligned. Arithmetic is float32 (float64 for float64).

A wrong argument is a ValueError that names the op, the argument, what was given and what is accepted. Index values are
checked on the CPU only: elsewhere that would wait for the device.

An op is imported when first used: `fmd-ext doctor` imports `fmd_ext.ops.library` to say why a library does not load.
"""

from __future__ import annotations

import importlib
from typing import Any

# Op -> the module of this folder that holds it.
FILES = {
    "append_": "append",
    "rope_append_": "rope_append",
    "branched_prefill": "branched_attention",
    "branched_decode": "branched_attention",
    "merge_": "merge",
}
__all__ = [*FILES]


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fmd_ext.ops.{FILES[name]}"), name)
    globals()[name] = value
    return value
