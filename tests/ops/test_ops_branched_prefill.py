"""branched_prefill against a mask and a softmax in plain PyTorch."""

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
    assert_attention,
    expected,
    make_case,
    shared_case,
    using_isa,
    using_threads,
)
from fmd_ext import ops

# One call with everything in it: odd lengths, both sides of the 96-key tile, branches, caches, nothing at all.
MIXED = (
    Group(1, 1),
    Group(17, 17),
    Group(63, 63, 33, sample=1),
    Group(113, 113, 33, sample=1),
    Group(5, 0, 96, sample=2),  # only the prefix
    Group(96, 97, 0),
    Group(97, 192, 1, sample=3),
    Group(10, 300, 17, sample=4),  # most keys were cached before
    Group(1, 95, 113, sample=4),
    Group(12, 5, 3, sample=5),  # the first queries see no own key yet
    Group(9, 4),  # and here nothing at all
    Group(0, 7, 3, sample=6),  # no query
    Group(3, 0),  # no key
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_mixed_groups(isa, dtype, head_dim, heads):
    case, want, plain = shared_case(MIXED, heads, head_dim, dtype)
    with using_isa(isa):
        result = ops.branched_prefill(*case.prefill_args())
    assert_attention(result, want, plain)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [2, 31, 32, 33, 65, 300])
def test_one_sample(isa, length):
    """As vanilla attention has it: one causal sequence."""
    case = make_case([Group(length, length)], (14, 2), 64, seed=length, spare_rows=0)
    with using_isa(isa):
        result = ops.branched_prefill(*case.prefill_args())
    assert_attention(result, expected(case), expected(case, torch.float32))


def test_a_group_larger_than_a_block():
    case = make_case([Group(2, 3, 1)], (512, 1), 128)
    result = ops.branched_prefill(*case.prefill_args())
    assert_attention(result, expected(case), expected(case, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_that_lie_as_in_a_real_pool(dtype):
    """Prefix and own keys next to each other, and pools whose slots are not head_dim apart."""
    case = make_case([Group(70, 100, 50)], (6, 2), 64, dtype, spare_rows=0)
    wide_k, wide_v = (torch.full((2, case.k.shape[1], 72), math.nan, dtype=dtype) for _ in range(2))
    for wide, pool in ((wide_k, case.k), (wide_v, case.v)):
        wide[:, :, :64] = pool
    args = list(case.prefill_args())
    contiguous = ops.branched_prefill(*args)
    args[1], args[2] = wide_k[:, :, :64], wide_v[:, :, :64]
    strided = ops.branched_prefill(*args)
    assert torch.equal(contiguous[0], strided[0]) and torch.equal(contiguous[1], strided[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_number_of_threads_changes_no_bit(isa, dtype):
    case = make_case([Group(211, 300, 40, 1), Group(97, 120, 40, 1), Group(64, 64)], (14, 2), 64, dtype)
    with using_isa(isa):
        with using_threads(1):
            out, lse = ops.branched_prefill(*case.prefill_args())
        for threads in (2, 3, 5):
            with using_threads(threads):
                again, lse_again = ops.branched_prefill(*case.prefill_args())
            assert torch.equal(out, again) and torch.equal(lse, lse_again), f"{threads} threads"


def test_chunks_change_no_bit():
    """A query's result depends on its keys alone, not on which other queries are in the call."""
    whole = make_case([Group(200, 200, 30)], (14, 2), 128, spare_rows=0)
    out, lse = ops.branched_prefill(*whole.prefill_args())
    kv_start, _, prefix_start, prefix_len = whole.key_ranges[0].tolist()
    for begin, end in ((0, 1), (1, 90), (90, 200)):
        rows = whole.qo_rows[begin:end]
        part, part_lse = ops.branched_prefill(
            whole.q,
            whole.k,
            whole.v,
            rows,
            torch.tensor([0, end - begin]),
            torch.tensor([[kv_start, end, prefix_start, prefix_len]]),
            end - begin,
            whole.scale,
            True,
        )
        assert torch.equal(part[rows], out[rows]) and torch.equal(part_lse[rows], lse[rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [1e-3, 30.0, 1000.0])
def test_small_and_huge_scores(isa, spread):
    case = make_case([Group(40, 250, 10)], (6, 2), 64, spread=spread)
    with using_isa(isa):
        result = ops.branched_prefill(*case.prefill_args())
    assert_attention(result, expected(case), expected(case, torch.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_maximum_that_moves_with_every_tile(isa):
    """Scores that rise, and scores that fall, over 400 keys: the online softmax rescales all the time, or never."""
    case = make_case([Group(30, 400)], (2, 2), 64)
    slots = slice(int(case.key_ranges[0, 0]), int(case.key_ranges[0, 0]) + 400)
    case.k[0, slots] = torch.linspace(-20, 20, 400)[:, None]
    case.k[1, slots] = torch.linspace(20, -20, 400)[:, None]
    case.q.fill_(0.25)
    with using_isa(isa):
        result = ops.branched_prefill(*case.prefill_args())
    assert_attention(result, expected(case), expected(case, torch.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_that_a_query_sees_is_not_hidden(isa, where):
    """And one in K or q does not spread to queries that do not see it."""
    case = make_case([Group(40, 40)], (6, 2), 64, spare_rows=0)
    rows, slot = case.qo_rows, int(case.key_ranges[0, 0]) + 20
    if where == "q":
        case.q[rows[20]] = math.nan
    else:
        getattr(case, where)[:, slot, 3] = math.nan
    with using_isa(isa):
        out, lse = ops.branched_prefill(*case.prefill_args())
    if where == "q":
        assert out[rows[20]].isnan().all() and lse[rows[20]].isnan().all()
        assert out[rows[:20]].isfinite().all() and out[rows[21:]].isfinite().all()
    elif where == "k":
        assert out[rows[20:]].isnan().all() and lse[rows[20:]].isnan().all()
        assert out[rows[:20]].isfinite().all() and lse[rows[:20]].isfinite().all()
    else:
        assert out[rows[20:], :, 3].isnan().all() and lse.isfinite().all()
        assert out[:, :, 4:].isfinite().all()


def test_without_lse():
    case = make_case(MIXED)
    out, lse = ops.branched_prefill(*case.prefill_args(return_lse=False))
    assert lse.shape == (0,) and lse.dtype == torch.float32
    assert torch.equal(out, ops.branched_prefill(*case.prefill_args())[0])


@pytest.mark.parametrize("groups", [[], [Group(0, 5)]])
@pytest.mark.parametrize("spare_rows", [0, 4])
def test_no_queries(groups, spare_rows):
    case = make_case(groups, spare_rows=spare_rows)
    out, lse = ops.branched_prefill(*case.prefill_args())
    assert torch.equal(out, torch.zeros(spare_rows, 6, 64))
    assert torch.equal(lse, torch.full((spare_rows, 6), -math.inf))


def test_offsets_beyond_32_bits():
    """The second kv head starts 2^31 elements after the first. The memory between is reserved, not touched."""
    case = make_case([Group(9, 20, 4)], (6, 2), 64, torch.bfloat16)
    slots = case.k.shape[1]
    far = torch.empty(2**31 + slots * 64, dtype=torch.bfloat16).as_strided((2, slots, 64), (2**31, 64, 1))
    args = list(case.prefill_args())
    near = ops.branched_prefill(*args)
    far.copy_(case.k)
    args[1] = far
    out, lse = ops.branched_prefill(*args)
    assert torch.equal(out, near[0]) and torch.equal(lse, near[1])


def test_opcheck():
    for return_lse in (False, True):
        case = make_case([Group(5, 9, 3), Group(3, 3, 3)], (6, 2), 16)
        torch.library.opcheck(torch.ops.fmd_ext.branched_prefill.default, case.prefill_args(return_lse))


def test_out_of_a_compiled_graph():
    """The fake kernel gives the shapes and strides that the op gives."""
    case = make_case([Group(5, 9, 3)], (6, 2), 16)
    compiled = torch.compile(ops.branched_prefill, backend="eager", fullgraph=True)
    out, lse = compiled(*case.prefill_args())
    want, want_lse = ops.branched_prefill(*case.prefill_args())
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_expectation_knows_causality():
    """The expectation itself, on a case worked out by hand: two keys of score 0, values 2 and 4."""
    case = make_case([Group(2, 2)], (1, 1), 8, spare_rows=0)
    start = int(case.key_ranges[0, 0])
    case.k[:, start : start + 2] = 0.0
    case.v[:, start] = 2.0
    case.v[:, start + 1] = 4.0
    out, lse = expected(case)
    assert out[case.qo_rows, 0, 0].tolist() == [2.0, 3.0]
    assert lse[case.qo_rows, 0].tolist() == pytest.approx([0.0, math.log(2.0)])
