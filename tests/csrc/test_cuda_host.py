"""The CUDA kernels, executed on the CPU: against plain PyTorch and the CPU ops, sanitized, in shuffled orders."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from test_ops_branched_decode import SAMPLES
from test_ops_branched_prefill import MIXED
from test_ops_rope_append import assert_rotated
from test_ops_rope_append import make as make_rope_append

from attention_cases import HEADS, Group, assert_as_exact, assert_attention, expected, make_case, shared_case
from cuda_host import Calls, build_driver
from fmd_ext import ops

HALF_DTYPES = [torch.bfloat16, torch.float16]
FAULTS = {
    "missing barrier after stores": 1,
    "missing barrier after copies": 2,
    "missing warp barrier": 3,
    "missing wait": 4,
    "wait that is too short": 5,
    "copy over what is still read": 6,
    "write out of bounds": 7,
    "divergent lanes": 8,
    "read of what nothing wrote": 9,
    "bank conflict": 10,
    "copy that nothing waits for": 11,
}


@pytest.fixture(scope="module", autouse=True)
def driver():
    build_driver()


def attend(case, decode=False, **options):
    calls = Calls()
    calls.attention(case, decode, **options)
    return calls.run()[0]


def same_bits(result, other):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(result, other, strict=True))


class TestHostExecution:
    """What runs the kernels has to find mistakes in kernels."""

    @pytest.mark.parametrize("seed", range(4))
    def test_right_kernel(self, seed):
        calls = Calls()
        calls.fault(0, seed)
        assert torch.equal(calls.run()[0][0], torch.ones(32))

    @pytest.mark.parametrize("fault", FAULTS)
    def test_each_mistake_is_found(self, fault):
        for seed in range(4):
            calls = Calls()
            calls.fault(FAULTS[fault], seed)
            said = calls.start()
            result = torch.frombuffer(bytearray(said.stdout), dtype=torch.float32) if said.stdout else torch.zeros(32)
            if said.returncode != 0 or not torch.equal(result, torch.ones(32)):
                return
        pytest.fail("not found in four orders")

    def test_sanitizer_sees_into_kernels(self):
        case = make_case([Group(3, 9)], (2, 2), 64, torch.bfloat16)
        case.key_ranges[0, 0] = case.k.shape[1] - 8  # the ninth key lies beyond the pool
        calls = Calls()
        calls.attention(case)
        said = calls.start()
        assert said.returncode != 0
        assert b"heap-buffer-overflow" in said.stderr and b"branched_prefill" in said.stderr


class TestAttention:
    @pytest.mark.parametrize("dtype", HALF_DTYPES)
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    def test_like_plain_pytorch_and_the_cpu_op_in_any_order(self, dtype, head_dim, heads, decode):
        case, want, plain = shared_case(SAMPLES if decode else MIXED, heads, head_dim, dtype)
        calls = Calls()
        for seed in (0, 1):
            calls.attention(case, decode, seed=seed)
        result, shuffled = calls.run()
        assert_attention(result, want, plain)
        assert same_bits(result, shuffled)
        op = ops.branched_decode(*case.decode_args()) if decode else ops.branched_prefill(*case.prefill_args())
        assert_as_exact(result[0], plain[0], op[0].double(), dtype)

    @pytest.mark.parametrize("length", [1, 17, 63, 64, 113])
    def test_one_sample(self, length):
        case = make_case([Group(length, length)], (14, 2), 64, torch.bfloat16, seed=length, spare_rows=0)
        assert_attention(attend(case, seed=length), expected(case), expected(case, torch.bfloat16))

    def test_orders(self):
        """Many orders of a small grid: long enough to use every slot of the rings again."""
        prefill = make_case([Group(20, 230, 40)], (7, 1), 64, torch.float16)
        decode = make_case([Group(1, 500, 40), Group(1, 300, 40)], (7, 1), 64, torch.float16)
        calls = Calls()
        for seed in range(12):
            calls.attention(prefill, seed=seed)
            calls.attention(decode, True, seed=seed)
        results = calls.run()
        for i in range(2, len(results)):
            assert same_bits(results[i % 2], results[i]), f"seed {i // 2}"

    @pytest.mark.parametrize("multiprocessors", [1, 7, 132])
    def test_number_of_splits(self, multiprocessors):
        case, want, plain = shared_case(SAMPLES, (7, 1), 64, torch.bfloat16)
        assert_attention(attend(case, True, multiprocessors=multiprocessors), want, plain)

    def test_more_parts_than_lanes(self):
        """70 parts, some of which no row of the second branch sees."""
        case = make_case([Group(1, 1500, 700), Group(1, 90, 700)], (7, 1), 128, torch.bfloat16)
        assert_attention(attend(case, True, multiprocessors=132), expected(case), expected(case, torch.bfloat16))

    @pytest.mark.parametrize("heads", [(28, 1), (64, 1), (20, 10)])
    def test_branches_and_heads_beyond_a_tile(self, heads):
        """Up to 64 heads per key head, and seven branches of one prefix: more than the 16 rows of a tile."""
        case = make_case([Group(1, 11 * i, 50) for i in range(7)], heads, 64, torch.bfloat16)
        want, plain = expected(case), expected(case, torch.bfloat16)
        assert_attention(attend(case, True), want, plain)
        assert_attention(attend(case), want, plain)

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    @pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
    def test_scale(self, decode, scale):
        groups = SAMPLES[:3] if decode else MIXED[1:4]
        case = dataclasses.replace(make_case(groups, (6, 2), 64, torch.float16), scale=scale)
        assert_attention(attend(case, decode), expected(case), expected(case, torch.float16))

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    def test_huge_scores(self, decode):
        case = make_case(SAMPLES if decode else MIXED, (6, 2), 64, torch.bfloat16, spread=300.0)
        assert_attention(attend(case, decode), expected(case), expected(case, torch.bfloat16))

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    def test_strides(self, decode):
        """Pools whose slots are not head_dim apart, and q at addresses that no vector load takes."""
        case = make_case(SAMPLES[:5] if decode else MIXED[:5], (6, 2), 64, torch.bfloat16)
        want = attend(case, decode)

        def spaced(tensor, width, shift):
            wide = torch.full((*tensor.shape[:2], width), math.nan, dtype=tensor.dtype)
            wide[:, :, shift : shift + 64] = tensor
            return wide[:, :, shift : shift + 64]

        odd = dataclasses.replace(
            case,
            q=spaced(case.q, 67, 1),
            k=spaced(case.k, 72, 8),
            v=spaced(case.v, 80, 0).transpose(0, 1).clone().transpose(0, 1),
        )
        assert same_bits(attend(odd, decode), want)

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    def test_offsets_beyond_2_to_the_31(self, decode):
        case = make_case(SAMPLES[:3] if decode else MIXED[:3], (4, 2), 64, torch.bfloat16)
        assert same_bits(attend(case, decode, head_distance=2**31 + 64), attend(case, decode))

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    @pytest.mark.parametrize("where", ["k", "v"])
    def test_nan_that_a_query_sees_is_not_hidden(self, decode, where):
        case = make_case([Group(1, 200), Group(1, 30)], (6, 2), 64, torch.bfloat16, spare_rows=0)
        getattr(case, where)[:, int(case.key_ranges[0, 0]) + 150, 3] = math.nan
        out, _ = attend(case, decode)
        hit, other = out[case.qo_rows[0]], out[case.qo_rows[1]]
        assert hit[:, 3].isnan().all() and other.isfinite().all()

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    def test_without_lse_groups_or_rows(self, decode):
        case = make_case(SAMPLES[:3] if decode else MIXED[:3], (6, 2), 64, torch.bfloat16)
        calls = Calls()
        calls.attention(case, decode)
        calls.attention(case, decode, return_lse=False)
        calls.attention(make_case([], (6, 2), 64, torch.bfloat16), decode)
        calls.attention(make_case([], (6, 2), 64, torch.bfloat16, spare_rows=0), decode)
        with_lse, without, no_group, no_row = calls.run()
        assert torch.equal(with_lse[0], without[0])
        assert torch.equal(no_group[0], torch.zeros(3, 6, 64).bfloat16())
        assert torch.equal(no_group[1], torch.full((3, 6), -math.inf))
        assert no_row[0].shape == (0, 6, 64)

    @pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
    @pytest.mark.parametrize(
        "dtype,head_dim,said", [(torch.float32, 64, "32-bit"), (torch.bfloat16, 80, "head_dim 80")]
    )
    def test_what_is_not_supported_is_refused(self, decode, dtype, head_dim, said):
        calls = Calls()
        calls.attention(make_case([Group(1, 1)], (2, 2), head_dim, dtype), decode)
        process = calls.start()
        message = process.stderr.decode()
        assert process.returncode == 2
        assert said in message and "accepted on CUDA are head_dim 64 and 128 of bfloat16 and float16" in message


@functools.cache
def pools(num_kv_heads, num_slots, head_dim, dtype):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(num_kv_heads, num_slots, head_dim, generator=generator).to(dtype) for _ in range(2))


class TestAppend:
    @pytest.mark.parametrize("kernel", ["narrow", "wide"])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
    @pytest.mark.parametrize("num_rows,num_kv_heads,head_dim", [(0, 2, 64), (1, 1, 8), (17, 2, 40), (63, 4, 128)])
    def test_rows_land_in_their_slots(self, dtype, num_rows, num_kv_heads, head_dim, kernel):
        k_pool, v_pool = pools(num_kv_heads, 100, head_dim, dtype)
        slots = torch.randperm(100)[:num_rows]
        k = torch.randn(num_kv_heads, num_rows, head_dim).to(dtype).transpose(0, 1)
        wide = torch.randn(num_rows, num_kv_heads, head_dim + 3).to(dtype)
        want_k, want_v, want_odd = k_pool.clone(), v_pool.clone(), v_pool.clone()
        want_k[:, slots], want_v[:, slots] = k.transpose(0, 1), (-k).transpose(0, 1)
        want_odd[:, slots] = wide[..., 3:].transpose(0, 1)
        calls = Calls()
        calls.append(k_pool, v_pool, k, (-k).contiguous(), slots, seed=1, kernel=kernel)
        calls.append(k_pool, v_pool, k, wide[..., 3:], slots, kernel=kernel)  # rows that begin anywhere
        aligned, odd = ([memory.view(want_k.shape) for memory in memories] for memories in calls.run())
        assert torch.equal(aligned[0], want_k) and torch.equal(aligned[1], want_v)
        assert torch.equal(odd[0], want_k) and torch.equal(odd[1], want_odd)

    @pytest.mark.parametrize("kernel", ["narrow", "wide"])
    @pytest.mark.parametrize("head_dim", [20, 7])
    def test_a_row_that_is_no_whole_vectors(self, kernel, head_dim):
        """Every row begins at a vector, and ends within one: what lies behind it, NaN, stays."""
        k_pool, v_pool, k, v = (torch.full((2, 30, 24), math.nan).bfloat16() for _ in range(4))
        for tensor in (k, v):
            tensor[..., :head_dim] = torch.randn(2, 30, head_dim)
        slots = torch.randperm(30)
        calls = Calls()
        rows = [tensor[..., :head_dim].transpose(0, 1) for tensor in (k, v)]
        calls.append(k_pool[..., :head_dim], v_pool[..., :head_dim], *rows, slots, kernel=kernel)
        for memory, rows in zip(calls.run()[0], (k, v), strict=True):
            landed = memory.view(2, 30, 24)
            assert torch.equal(landed[:, slots, :head_dim], rows[..., :head_dim])
            assert landed[..., head_dim:].isnan().all()

    @pytest.mark.parametrize("kernel", ["narrow", "wide"])
    def test_offsets_beyond_2_to_the_31(self, kernel):
        k_pool, v_pool = pools(3, 40, 64, torch.bfloat16)
        k, v = torch.randn(2, 17, 3, 64).bfloat16()
        calls = Calls()
        for distance in (0, 2**31 + 64):
            calls.append(k_pool, v_pool, k, v, torch.arange(17), kernel=kernel, head_distance=distance)
        assert same_bits(*calls.run())


@pytest.mark.parametrize("kernel", ["narrow", "wide"])
class TestRopeAppend:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
    @pytest.mark.parametrize(
        "num_rows,heads,head_dim", [(0, (2, 2), 64), (1, (2, 1), 8), (17, (6, 2), 40), (33, (7, 1), 128)]
    )
    def test_like_plain_pytorch_and_the_cpu_op(self, dtype, num_rows, heads, head_dim, kernel):
        calls, cases = Calls(), []
        for angle_dtype in (dtype, torch.float32):
            case = make_rope_append(num_rows, heads, head_dim, dtype, angle_dtype, num_slots=60)
            # Q and K as attention layers hand it over; the rest contiguous, as the driver gives back what it holds.
            case |= {name: case[name].contiguous() for name in ("k_pool", "v_pool", "q_out")}
            cases.append(case)
            calls.rope_append(**case, seed=1, kernel=kernel)
        for case, (q_out, k_pool, v_pool) in zip(cases, calls.run(), strict=True):
            result = case | {"q_out": q_out, "k_pool": k_pool, "v_pool": v_pool}
            assert_rotated(case, result)
            op = {name: tensor.clone() for name, tensor in case.items()}
            ops.rope_append_(**op)
            for name in ("q_out", "k_pool", "v_pool"):
                assert_as_exact(result[name], None, op[name].double(), dtype)

    def test_rows_that_begin_anywhere(self, kernel):
        """A call that no vector load fits, one whose angles alone are so, and one that loads vectors throughout."""
        case = make_rope_append(17, (6, 2), 64, torch.bfloat16, torch.bfloat16, num_slots=60)
        case |= {name: case[name].contiguous() for name in ("k_pool", "v_pool", "q_out")}

        def shifted(*names):
            return {name: torch.cat([case[name][..., :3], case[name]], -1)[..., 3:] for name in names}

        calls = Calls()
        for moved in ({}, shifted("cos", "sin"), shifted("q", "k", "v", "cos", "sin")):
            calls.rope_append(**(case | moved), kernel=kernel)
        first, *others = calls.run()
        assert all(same_bits(first, other) for other in others)

    def test_offsets_beyond_2_to_the_31(self, kernel):
        case = make_rope_append(9, (6, 3), 64, torch.bfloat16, torch.bfloat16, num_slots=60)
        case |= {name: case[name].contiguous() for name in ("k_pool", "v_pool", "q_out")}
        calls = Calls()
        for distance in (0, 2**31 + 64):
            calls.rope_append(**case, kernel=kernel, head_distance=distance)
        assert same_bits(*calls.run())


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
    @pytest.mark.parametrize("num_pairs,hidden_size", [(0, 64), (1, 1), (17, 63), (5, 3584)])
    def test_like_the_cpu_op(self, dtype, num_pairs, hidden_size):
        rows = torch.randperm(2 * num_pairs + 3)
        home_rows, away_rows = rows[:num_pairs].clone(), rows[num_pairs : 2 * num_pairs].clone()
        away_rows[1::2] = away_rows[: len(away_rows[1::2])].clone()  # an away row may serve twice
        weights = torch.rand(num_pairs)
        weights[:2] = torch.tensor([0.0, 1.0])[: len(weights[:2])]
        hidden = torch.randn(len(rows), hidden_size).to(dtype)
        calls = Calls()
        calls.merge(hidden, home_rows, away_rows, weights, seed=1)
        merged = calls.run()[0][0]
        exact = hidden.double()
        exact[home_rows] = weights[:, None] * exact[home_rows] + (1 - weights[:, None]) * exact[away_rows]
        others = torch.ones(len(rows), dtype=torch.bool)
        others[home_rows] = False
        assert torch.equal(merged[others], hidden[others])
        assert_as_exact(merged, exact.to(dtype), exact, dtype)
        op = hidden.clone()
        ops.merge_(op, home_rows, away_rows, weights)
        assert_as_exact(merged, exact.to(dtype), op.double(), dtype)
