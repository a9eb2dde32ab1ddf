"""Each op once, on a small input, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fmd_ext import ops

TOLERANCE = 1e-5  # float32: some hundred roundings of values near 1

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 4, 2, 64, 32
SCALE = HEAD_DIM**-0.5


def errors(device: torch.device) -> dict[str, float | str]:
    """By op: the largest absolute difference from plain PyTorch in float32, or the message of the error it raised."""
    found: dict[str, float | str] = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                found[name] = float(check(random))
        except Exception as error:  # whatever is broken, the report goes on
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


Random = Callable[..., torch.Tensor]


def _append(random: Random) -> torch.Tensor:
    pools, rows = random(2, KV_HEADS, SLOTS, HEAD_DIM), random(2, 3, KV_HEADS, HEAD_DIM)
    slots = torch.tensor([7, 0, 31], device=rows.device)
    expected = pools.clone()
    expected[:, :, slots] = rows.transpose(1, 2)
    ops.append_(pools[0], pools[1], rows[0], rows[1], slots)
    return (pools - expected).abs().max()


def _rope_append(random: Random) -> torch.Tensor:
    pools, rows, q = random(2, KV_HEADS, SLOTS, HEAD_DIM), random(2, 3, KV_HEADS, HEAD_DIM), random(3, HEADS, HEAD_DIM)
    cos, sin = random(2, 3, HEAD_DIM)
    slots = torch.tensor([7, 0, 31], device=rows.device)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return x * cos[:, None] + torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1) * sin[:, None]

    expected, q_out = pools.clone(), torch.empty_like(q)
    expected[:, :, slots] = torch.stack([rotated(rows[0]), rows[1]]).transpose(1, 2)
    ops.rope_append_(pools[0], pools[1], q_out, q, rows[0], rows[1], cos, sin, slots)
    return torch.maximum((pools - expected).abs().max(), (q_out - rotated(q)).abs().max())


def _prefill(random: Random) -> torch.Tensor:
    """Five queries in one group: a prefix of four keys, and seven own keys of which the first two were there before."""
    q, k, v = random(5, HEADS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM)
    rows, groups = torch.arange(5, device=q.device), torch.tensor([0, 5], device=q.device)
    key_ranges = torch.tensor([[10, 7, 2, 4]], device=q.device)
    out, _ = ops.branched_prefill(q, k, v, rows, groups, key_ranges, 5, SCALE)
    expected = [_attention(q[i], k, v, [*range(2, 6), *range(10, 13 + i)]) for i in range(5)]
    return (out - torch.stack(expected)).abs().max()


def _decode(random: Random) -> torch.Tensor:
    """Both branches of one sample, with a common prefix."""
    q, k, v = random(2, HEADS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM), random(KV_HEADS, SLOTS, HEAD_DIM)
    key_ranges = torch.tensor([[10, 7, 2, 4], [20, 3, 2, 4]], device=q.device)
    out, _ = ops.branched_decode(q, k, v, torch.arange(2, device=q.device), key_ranges, SCALE)
    slots = ([*range(2, 6), *range(10, 17)], [*range(2, 6), *range(20, 23)])
    return (out - torch.stack([_attention(q[i], k, v, slots[i]) for i in range(2)])).abs().max()


def _merge(random: Random) -> torch.Tensor:
    hidden = random(5, HEAD_DIM)
    home, away, weights = (torch.tensor(values, device=hidden.device) for values in ([0, 2], [4, 3], [0.8, 0.5]))
    expected = hidden.clone()
    expected[home] = weights[:, None] * hidden[home] + (1 - weights[:, None]) * hidden[away]
    ops.merge_(hidden, home, away, weights)
    return (hidden - expected)[:3].abs().max()


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """q [heads, head_dim] over the given slots of k and v [kv_heads, slots, head_dim]."""
    keys, values = (pool[:, slots].repeat_interleave(HEADS // KV_HEADS, dim=0) for pool in (k, v))
    weights = (torch.einsum("hd,hsd->hs", q, keys) * SCALE).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, values)


CHECKS: dict[str, Callable[[Random], torch.Tensor]] = {
    "append_": _append,
    "rope_append_": _rope_append,
    "branched_prefill": _prefill,
    "branched_decode": _decode,
    "merge_": _merge,
}
