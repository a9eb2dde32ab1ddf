"""merge_: a weighted sum of pairs of rows, rounded once, in place."""

from __future__ import annotations

import pytest
import torch

from attention_cases import DTYPES, ISAS, assert_as_exact, using_isa, using_threads
from fmd_ext import ops


def pairs(num_rows, num_pairs):
    """Pairs of distinct rows in random order; away rows may serve twice."""
    rows = torch.randperm(num_rows)
    home = rows[:num_pairs]
    return home, rows[num_pairs:][torch.randint(num_rows - num_pairs, (num_pairs,))], torch.rand(num_pairs)


def merged(hidden, home, away, weights, dtype):
    out = hidden.to(dtype)
    w = weights[:, None].to(dtype)
    out[home] = w * out[home] + (1 - w) * out[away]
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 64, 1027])
@pytest.mark.parametrize("num_pairs", [1, 17, 113])
def test_weighted_sum(isa, dtype, hidden_size, num_pairs):
    hidden = torch.randn(300, hidden_size).to(dtype)
    home, away, weights = pairs(300, num_pairs)
    want = merged(hidden, home, away, weights, torch.float64)
    plain = merged(hidden, home, away, weights, torch.float32).to(dtype)
    others = torch.ones(300, dtype=torch.bool)
    others[home] = False
    before = hidden.clone()
    with using_isa(isa):
        ops.merge_(hidden, home, away, weights)
    assert_as_exact(hidden, plain, want, dtype)
    assert torch.equal(hidden[others], before[others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_tensor_are_read_once_rounded_once(isa, dtype):
    """Weights 1, 0 and 0.5 have exact results, in rows that are not adjacent in memory."""
    wide = torch.randn(8, 100).to(dtype)
    hidden = wide[:, 3:80]
    home, away = hidden[:3].clone(), hidden[3:6].clone()
    tail = wide[:, 80:].clone()
    with using_isa(isa):
        ops.merge_(hidden, torch.arange(3), torch.arange(3, 6), torch.tensor([1.0, 0.0, 0.5]))
    assert torch.equal(hidden[0], home[0]) and torch.equal(hidden[1], away[1])
    assert torch.equal(hidden[2], ((home[2].double() + away[2].double()) / 2).to(dtype))
    assert torch.equal(hidden[3:6], away) and torch.equal(wide[:, 80:], tail)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(isa, dtype):
    """Weight 1 and an away row of zeros: every pattern of the storage type goes through fp32 and back."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    hidden = torch.stack([every, torch.zeros_like(every)])
    with using_isa(isa):
        ops.merge_(hidden, torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    nan = every.isnan()
    assert torch.equal(hidden[0].isnan(), nan)
    # -0 + 0 * 0 is +0: equal as numbers is what counts.
    assert torch.equal(hidden[0][~nan], every[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_as_torch_rounds_them(isa, dtype):
    """The mean of neighbouring values lies halfway or further: ties to even, overflow to infinity, subnormals."""
    every = torch.arange(2**16 // 2, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    hidden = torch.stack([every[:-1], every[1:]])
    want = (0.5 * hidden[0].float() + 0.5 * hidden[1].float()).to(dtype)
    with using_isa(isa):
        ops.merge_(hidden, torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]))
    assert torch.equal(hidden[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype):
    hidden = torch.randn(600, 512).to(dtype)
    args = pairs(600, 300)
    results = []
    for threads in (1, 2, 5):
        copy = hidden.clone()
        with using_threads(threads):
            ops.merge_(copy, *args)
        results.append(copy)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_pairs():
    hidden = torch.randn(3, 8)
    before = hidden.clone()
    none = torch.empty(0, dtype=torch.int64)
    ops.merge_(hidden, none, none, torch.empty(0))
    assert torch.equal(hidden, before)


def test_opcheck():
    args = (torch.randn(9, 24), torch.tensor([0, 5]), torch.tensor([7, 7]), torch.tensor([0.8, 0.2]))
    torch.library.opcheck(torch.ops.fmd_ext.merge_.default, args)
