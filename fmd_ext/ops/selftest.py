"""Each op once, on a small input, against plain PyTorch on the CPU in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fmd_ext import ops
from fmd_ext.ops import dispatch

HEADS, KV_HEADS, SLOTS = 4, 2, 300
# Largest difference from plain PyTorch, relative to the largest value: some hundred roundings in float32, a few of the
# results and of the softmax's weights in low precision.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}


class Inputs:
    """Random tensors of a dtype on a device, and int64 ones; the same values every time.

    Args:
        device, dtype: of the floating-point tensors.
        head_dim: of keys and values.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        self.device = device
        self.dtype = dtype
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)

    def index(self, values: list | range) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)


def errors(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> dict[str, float | str]:
    """By op: the largest difference from plain PyTorch relative to the largest value, or the message of its error."""
    found: dict[str, float | str] = {}
    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                found[name] = max(_difference(*pair) for pair in check(Inputs(device, dtype, head_dim)))
        except Exception as error:  # whatever is broken, the report goes on
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


def dtypes_of(op: str, device_type: str) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels of `op` take on a type of device."""
    narrow = device_type == "cuda" and op.startswith("branched_")
    return dispatch.CUDA_ATTENTION_DTYPES if narrow else dispatch.KERNEL_DTYPES


def problems(device: torch.device) -> list[str]:
    """What the kernels of a CUDA device get wrong, over their dtypes and head sizes."""
    said = []
    for dtype in dispatch.CUDA_ATTENTION_DTYPES:
        for head_dim in dispatch.CUDA_ATTENTION_HEAD_DIMS:
            for name, outcome in errors(device, dtype, head_dim).items():
                if problem := problem_of(name, dtype, outcome):
                    said.append(problem)
    return said


def problem_of(op: str, dtype: torch.dtype, outcome: float | str) -> str:
    """What is wrong with an outcome of `errors`; "" where nothing is."""
    name = str(dtype).removeprefix("torch.")
    if isinstance(outcome, str):
        return f"{op} of {name} fails: {outcome}"
    return "" if outcome <= TOLERANCES[dtype] else f"{op} of {name} gives a wrong result, off by {outcome:.1e}"


Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # what an op gave, and what it should have given


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((_exact(got) - want).abs().max() / want.abs().max().clamp(min=1.0))


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().double()


def _append(inputs: Inputs) -> Pairs:
    pools = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    rows, slots = inputs.random(2, 3, KV_HEADS, inputs.head_dim), [7, 0, SLOTS - 1]
    want = _exact(pools)
    want[:, :, slots] = _exact(rows).transpose(1, 2)
    ops.append_(pools[0], pools[1], rows[0], rows[1], inputs.index(slots))
    return [(pools, want)]


def _rope_append(inputs: Inputs) -> Pairs:
    pools = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    rows, slots = inputs.random(2, 3, KV_HEADS, inputs.head_dim), [7, 0, SLOTS - 1]
    q, (cos, sin) = inputs.random(3, HEADS, inputs.head_dim), inputs.random(2, 3, inputs.head_dim)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        low, high = _exact(x).chunk(2, dim=-1)
        return _exact(x) * _exact(cos)[:, None] + torch.cat([-high, low], -1) * _exact(sin)[:, None]

    want = _exact(pools)
    want[:, :, slots] = torch.stack([rotated(rows[0]), _exact(rows[1])]).transpose(1, 2)
    q_out = torch.empty_like(q)
    ops.rope_append_(pools[0], pools[1], q_out, q, rows[0], rows[1], cos, sin, inputs.index(slots))
    return [(pools, want), (q_out, rotated(q))]


def _prefill(inputs: Inputs) -> Pairs:
    """70 queries in one group: a prefix of 40 keys, and 200 own keys of which 130 were there before."""
    q = inputs.random(70, HEADS, inputs.head_dim)
    k, v = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    key_ranges = inputs.index([100, 200, 2, 40]).view(1, 4)
    groups = inputs.index([0, 70])
    out, _ = ops.branched_prefill(q, k, v, inputs.index(range(70)), groups, key_ranges, 70, inputs.scale)
    slots = [[*range(2, 42), *range(100, 231 + i)] for i in range(70)]
    return [(out, _attention(q, k, v, slots, inputs.scale))]


def _decode(inputs: Inputs) -> Pairs:
    """Both branches of one sample, with a common prefix."""
    q = inputs.random(2, HEADS, inputs.head_dim)
    k, v = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    key_ranges = inputs.index([100, 170, 2, 40, 290, 3, 2, 40]).view(2, 4)
    out, _ = ops.branched_decode(q, k, v, inputs.index(range(2)), key_ranges, inputs.scale)
    slots = [[*range(2, 42), *range(100, 270)], [*range(2, 42), *range(290, 293)]]
    return [(out, _attention(q, k, v, slots, inputs.scale))]


def _merge(inputs: Inputs) -> Pairs:
    hidden, home, away = inputs.random(5, 64), [0, 2], [4, 3]
    weights = torch.tensor([0.8, 0.5], device=inputs.device)
    want, weight = _exact(hidden), _exact(weights)[:, None]
    want[home] = weight * want[home] + (1 - weight) * want[away]
    ops.merge_(hidden, inputs.index(home), inputs.index(away), weights)
    return [(hidden, want)]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: list[list[int]], scale: float) -> torch.Tensor:
    """q [rows, heads, head_dim], each row over its own slots of k and v [kv_heads, slots, head_dim]."""
    visible = torch.zeros(len(q), SLOTS, dtype=torch.bool)
    for row, seen in enumerate(slots):
        visible[row, seen] = True
    k, v = (_exact(pool).repeat_interleave(HEADS // KV_HEADS, dim=0) for pool in (k, v))
    scores = torch.einsum("rhd,hsd->rhs", _exact(q), k) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("rhs,hsd->rhd", weights, v)


CHECKS: dict[str, Callable[[Inputs], Pairs]] = {
    "append_": _append,
    "rope_append_": _rope_append,
    "branched_prefill": _prefill,
    "branched_decode": _decode,
    "merge_": _merge,
}
