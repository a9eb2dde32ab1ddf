"""Each op once, on a small input, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fmd_ext import ops

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 4, 2, 64, 32
SCALE = HEAD_DIM**-0.5


def errors(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float] | str]:
    """By op: the largest absolute difference from plain PyTorch in float32 and what is allowed, or the message of the
    error it raised.

    Allowed is what rounding costs: 1e-5, some hundred roundings of float32 values near 1, and twice the spacing of
    ``dtype`` at the largest value. Inputs are random, of the given device and dtype.
    """
    found: dict[str, tuple[float, float] | str] = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                actual, expected = check(random)
                allowed = 1e-5 + 2 * torch.finfo(dtype).eps * float(expected.abs().max())
                found[name] = float((actual.float() - expected).abs().max()), allowed
        except Exception as error:  # whatever is broken, the report goes on
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


Random = Callable[..., torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]  # what the op gives, and float32 of plain PyTorch from the same inputs


def _append(random: Random) -> Pair:
    pools, rows = random(2, KV_HEADS, SLOTS, HEAD_DIM), random(2, 3, KV_HEADS, HEAD_DIM)
    slots = torch.tensor([7, 0, 31], device=rows.device)
    expected = pools.float().clone()  # `float` of a float32 tensor is the tensor itself
    expected[:, :, slots] = rows.float().transpose(1, 2)
    ops.append_(pools[0], pools[1], rows[0], rows[1], slots)
    return pools, expected


def _rope_append(random: Random) -> Pair:
    pools, rows, q = random(2, KV_HEADS, SLOTS, HEAD_DIM), random(2, 3, KV_HEADS, HEAD_DIM), random(3, HEADS, HEAD_DIM)
    cos, sin = random(2, 3, HEAD_DIM)
    slots = torch.tensor([7, 0, 31], device=rows.device)

    def turned(x: torch.Tensor) -> torch.Tensor:
        x, half = x.float(), HEAD_DIM // 2
        return x * cos.float()[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.float()[:, None]

    expected, turned_q = pools.float().clone(), torch.empty_like(q)
    expected[:, :, slots] = torch.stack([turned(rows[0]), rows[1].float()]).transpose(1, 2)
    ops.rope_append_(pools[0], pools[1], turned_q, q, rows[0], rows[1], cos, sin, slots)
    return torch.cat([pools.flatten(), turned_q.flatten()]), torch.cat([expected.flatten(), turned(q).flatten()])


def _prefill(random: Random) -> Pair:
    """Five queries in one group: a prefix of four keys, and seven own keys of which the first two were there before."""
    q, k, v = random(5, HEADS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM)
    rows, groups = torch.arange(5, device=q.device), torch.tensor([0, 5], device=q.device)
    segments = torch.tensor([[10, 7, 2, 4]], device=q.device)
    out, _ = ops.branched_prefill(q, k, v, rows, groups, segments, 5, SCALE)
    return out, torch.stack([_attention(q[i], k, v, [*range(2, 6), *range(10, 13 + i)]) for i in range(5)])


def _decode(random: Random) -> Pair:
    """Both branches of one sample, with a common prefix."""
    q, k, v = random(2, HEADS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM)
    segments = torch.tensor([[10, 7, 2, 4], [20, 3, 2, 4]], device=q.device)
    out, _ = ops.branched_decode(q, k, v, torch.arange(2, device=q.device), segments, SCALE)
    slots = ([*range(2, 6), *range(10, 17)], [*range(2, 6), *range(20, 23)])
    return out, torch.stack([_attention(q[i], k, v, slots[i]) for i in range(2)])


def _merge(random: Random) -> Pair:
    hidden = random(5, HEAD_DIM)
    home, away, weights = (torch.tensor(values, device=hidden.device) for values in ([0, 2], [4, 3], [0.8, 0.5]))
    expected = hidden.float().clone()
    expected[home] = weights[:, None] * expected[home] + (1 - weights[:, None]) * expected[away]
    ops.merge_(hidden, home, away, weights)
    return hidden[:3], expected[:3]


def _merge_norm(random: Random) -> Pair:
    hidden, norm_weight = random(5, HEAD_DIM), random(HEAD_DIM)
    away, weights = (torch.tensor(values, device=hidden.device) for values in ([4, -1, 3], [0.8, 0.0, 0.5]))
    expected = hidden.float().clone()
    for row, other, weight in ((0, 4, 0.8), (2, 3, 0.5)):
        expected[row] = weight * expected[row] + (1 - weight) * expected[other]
    merged = expected[:3]
    normed = ops.merge_norm_(hidden, away, weights, norm_weight, 1e-6)
    scale = (merged.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return torch.cat([hidden[:3], normed]), torch.cat([merged, merged * scale * norm_weight.float()])


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """q [heads, head_dim] over the given slots of k and v [kv_heads, slots, head_dim], in float32."""
    keys, values = (pool[:, slots].float().repeat_interleave(HEADS // KV_HEADS, dim=0) for pool in (k, v))
    weights = (torch.einsum("hd,hsd->hs", q.float(), keys) * SCALE).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, values)


CHECKS: dict[str, Callable[[Random], Pair]] = {
    "append_": _append,
    "rope_append_": _rope_append,
    "branched_prefill": _prefill,
    "branched_decode": _decode,
    "merge_": _merge,
    "merge_norm_": _merge_norm,
}
