"""branched_decode against a mask and a softmax in plain PyTorch, and against branched_prefill."""

from __future__ import annotations

import math

import pytest
import torch

from attention_cases import (
    DTYPES,
    HEAD_DIMS,
    HEADS,
    ISAS,
    Group,
    assert_as_exact,
    assert_attention,
    expected,
    make_case,
    shared_case,
    using_isa,
    using_threads,
)
from fmd_ext import ops

# Branches that share a prefix, one that has none, lengths on both sides of the 96-key tile and the 384-key chunk.
SAMPLES = (
    Group(1, 113, 17, sample=0),
    Group(1, 63, 17, sample=0),
    Group(1, 300, 0, sample=1),
    Group(1, 1, 0, sample=2),
    Group(1, 0, 96, sample=3),  # only the prefix
    Group(1, 97, 96, sample=3),
    Group(1, 0, 0, sample=4),  # no key
    Group(1, 385, 384, sample=5),
    Group(1, 767, 384, sample=5),
    Group(1, 12, 384, sample=6),  # as long a prefix, but another one
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_samples(isa, dtype, head_dim, heads):
    case, want, plain = shared_case(SAMPLES, heads, head_dim, dtype)
    with using_isa(isa):
        result = ops.branched_decode(*case.decode_args())
    assert_attention(result, want, plain)


@pytest.mark.parametrize("isa", ISAS)
def test_more_rows_than_a_vector_has_lanes(isa):
    """28 query heads per key head, and three branches of one prefix: 84 rows share a chunk."""
    case = make_case([Group(1, 20 * i, 50) for i in range(3)], (28, 1), 64)
    with using_isa(isa):
        result = ops.branched_decode(*case.decode_args())
    assert_attention(result, expected(case), expected(case, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_like_prefill_with_one_query(dtype):
    case = make_case(SAMPLES, (14, 2), 128, dtype)
    out, lse = ops.branched_decode(*case.decode_args())
    prefill, prefill_lse = ops.branched_prefill(*case.prefill_args())
    assert_as_exact(out, None, prefill.double(), dtype)
    seen = lse > -math.inf
    assert_as_exact(lse[seen], None, prefill_lse[seen].double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_number_of_threads_changes_no_bit(isa, dtype):
    case = make_case(SAMPLES, (14, 2), 64, dtype)
    with using_isa(isa):
        with using_threads(1):
            out, lse = ops.branched_decode(*case.decode_args())
        for threads in (2, 3, 5):
            with using_threads(threads):
                again, lse_again = ops.branched_decode(*case.decode_args())
            assert torch.equal(out, again) and torch.equal(lse, lse_again), f"{threads} threads"


def test_other_samples_change_no_bit():
    case = make_case(SAMPLES, (14, 2), 64)
    out, lse = ops.branched_decode(*case.decode_args())
    for pair in (slice(0, 2), slice(7, 9)):  # the groups of samples 0 and 5
        rows = case.qo_rows[pair]
        alone, lse_alone = ops.branched_decode(case.q, case.k, case.v, rows, case.key_ranges[pair], case.scale, True)
        assert torch.equal(alone[rows], out[rows]) and torch.equal(lse_alone[rows], lse[rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_huge_scores(isa, spread):
    """Chunks whose maxima differ by thousands are combined without overflow."""
    case = make_case(SAMPLES, (6, 2), 64, spread=spread)
    with using_isa(isa):
        result = ops.branched_decode(*case.decode_args())
    assert_attention(result, expected(case), expected(case, torch.float32))


@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_that_a_query_sees_is_not_hidden(where):
    case = make_case([Group(1, 800), Group(1, 30)], (6, 2), 64, spare_rows=0)
    getattr(case, where)[:, int(case.key_ranges[0, 0]) + 700, 3] = math.nan
    out, _ = ops.branched_decode(*case.decode_args())
    hit, other = out[case.qo_rows[0]], out[case.qo_rows[1]]
    assert hit[:, 3].isnan().all() and other.isfinite().all()


def test_without_lse_and_without_groups():
    case = make_case(SAMPLES)
    out, lse = ops.branched_decode(*case.decode_args(return_lse=False))
    assert lse.shape == (0,) and lse.dtype == torch.float32
    assert torch.equal(out, ops.branched_decode(*case.decode_args())[0])
    nothing, lse = ops.branched_decode(*make_case([]).decode_args())
    assert torch.equal(nothing, torch.zeros(3, 6, 64)) and torch.equal(lse, torch.full((3, 6), -math.inf))


def test_opcheck():
    for return_lse in (False, True):
        case = make_case(SAMPLES[:3], (6, 2), 16)
        torch.library.opcheck(torch.ops.fmd_ext.branched_decode.default, (*case.decode_args(return_lse), False))
