"""merge_norm_: the merge of the home rows and the norm that follows, as two steps would give them."""

from __future__ import annotations

import pytest
import torch

from attention_cases import DTYPES, ISAS, assert_as_exact, using_isa, using_threads
from fmd_ext import ops

EPS = 1e-6


def make(num_home, num_away, hidden_size, dtype):
    """hidden, away_rows (some -1, some twice), weights, norm_weight."""
    hidden = torch.randn(num_home + num_away, hidden_size).to(dtype)
    away_rows = torch.randint(-num_away, num_away, (num_home,))
    away_rows = torch.where(away_rows < 0, -1, away_rows + num_home)
    weights = torch.rand(num_home).masked_fill_(away_rows < 0, float("nan"))
    return hidden, away_rows, weights, torch.randn(hidden_size).to(dtype)


def merged(hidden, away_rows, weights, dtype):
    """The home rows, merged in `dtype`."""
    home = hidden[: len(away_rows)].to(dtype, copy=True)
    has = away_rows >= 0
    w = weights[has, None].to(dtype)
    home[has] = w * home[has] + (1 - w) * hidden[away_rows[has]].to(dtype)
    return home


def normed(rows, norm_weight, eps=EPS):
    """RMS norm as transformers' decoders compute it."""
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    return norm_weight.to(rows.dtype) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 64, 1027])
@pytest.mark.parametrize("num_home,num_away", [(1, 1), (17, 9), (113, 40)])
def test_like_plain_pytorch(isa, dtype, hidden_size, num_home, num_away):
    hidden, away_rows, weights, norm_weight = make(num_home, num_away, hidden_size, dtype)
    before = hidden.clone()
    with using_isa(isa):
        out = ops.merge_norm_(hidden, away_rows, weights, norm_weight, EPS)
        split = before.clone()
        has = away_rows >= 0
        ops.merge_(split, has.nonzero()[:, 0], away_rows[has], weights[has])
    assert torch.equal(hidden, split), "the merge is that of merge_, bit for bit"
    rows = hidden[:num_home]
    assert_as_exact(out, normed(rows, norm_weight), normed(rows.double(), norm_weight), dtype)
    exact = merged(before, away_rows, weights, torch.float64)
    assert_as_exact(rows, merged(before, away_rows, weights, torch.float32).to(dtype), exact, dtype)


def test_like_the_norm_of_transformers():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    hidden, away_rows, weights, norm_weight = make(9, 5, 64, torch.float32)
    norm = Qwen2RMSNorm(64, eps=1e-5)
    norm.weight.copy_(norm_weight)
    want = norm(merged(hidden, away_rows, weights, torch.float32))
    torch.testing.assert_close(ops.merge_norm_(hidden, away_rows, weights, norm_weight, 1e-5), want)


def test_rows_of_a_wider_tensor():
    wide = torch.randn(8, 100)
    before = wide.clone()
    hidden, away_rows, weights = wide[:, 3:80], torch.tensor([7, -1, 5]), torch.tensor([1.0, 0.5, 0.0])
    out = ops.merge_norm_(hidden, away_rows, weights, torch.ones(77), EPS)
    want = before[[0, 1, 5], 3:80]
    assert torch.equal(wide[:3, 3:80], want) and torch.equal(wide[3:], before[3:])
    assert torch.equal(wide[:, 80:], before[:, 80:]) and torch.equal(wide[:, :3], before[:, :3])
    assert out.is_contiguous()
    torch.testing.assert_close(out, normed(want, torch.ones(77)))


def test_eps_carries_a_row_of_zeros():
    out = ops.merge_norm_(torch.zeros(2, 8), torch.tensor([1]), torch.ones(1), torch.ones(8), EPS)
    assert torch.equal(out, torch.zeros(1, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype):
    hidden, *arguments = make(300, 100, 512, dtype)
    results = []
    for threads in (1, 3):
        with using_threads(threads):
            results.append(ops.merge_norm_(hidden.clone(), *arguments, EPS))
    assert torch.equal(*results)


def test_no_rows():
    out = ops.merge_norm_(torch.randn(3, 8), torch.empty(0, dtype=torch.int64), torch.empty(0), torch.ones(8), EPS)
    assert out.shape == (0, 8)


def test_opcheck():
    hidden, *arguments = make(5, 4, 24, torch.float32)
    torch.library.opcheck(torch.ops.fmd_ext.merge_norm_.default, (hidden, *arguments, EPS))
