"""Weights that two environments can make alike: every tensor from a seed and its own name, by numpy's frozen generator.

The recordings in tests/fixtures come from official code whose parameters were filled by this rule, under the official
names; tests/fixtures/README.md says which.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch


def seeded_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 of ``shape``: normal, scaled by a matrix's inputs; vectors small, around 1 for norms' weights."""
    values = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if len(shape) < 2:
        return (0.1 * values + (name.endswith("weight") or name.endswith("_scale"))).astype(np.float32)
    return (values / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


@torch.no_grad()
def fill(tensors: Mapping[str, torch.Tensor], seed: int = 0) -> None:
    """Overwrites parameters, given by their official names; one that has several names follows the first."""
    seen = set()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensor.copy_(torch.from_numpy(seeded_tensor(name, tuple(tensor.shape), seed)))
