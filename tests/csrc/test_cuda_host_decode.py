"""The persistent decode kernel and the fixed split, executed on the CPU; and what runs kernels one behind the other."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_cuda_host import HALF_DTYPES, attend, same_bits
from test_ops_branched_decode import SAMPLES

from attention_cases import HEADS, Group, assert_attention, expected, make_case, shared_case
from cuda_host import FAULT_GRIDS, Calls, build_driver

FAULTS = {
    "no wait for the kernel ahead": 1,
    "read before the wait": 2,
    "wait of some threads": 3,
    "nothing allows the blocks behind": 4,
}


@pytest.fixture(scope="module", autouse=True)
def driver():
    build_driver()


def decode(case, **options):
    return attend(case, True, kernel="persistent", **options)


class TestKernelsBehindEachOther:
    @staticmethod
    def run(fault):
        calls = Calls()
        for seed in range(5):
            calls.fault(fault, seed, FAULT_GRIDS)
        said = calls.start()
        return said.returncode, torch.frombuffer(bytearray(said.stdout) or bytearray(4), dtype=torch.float32)

    def test_right_kernels(self):
        status, result = self.run(0)
        assert status == 0 and torch.equal(result, torch.ones(5 * 32))

    @pytest.mark.parametrize("fault", FAULTS)
    def test_each_mistake_is_found(self, fault):
        status, result = self.run(FAULTS[fault])
        assert status != 0 or not torch.equal(result, torch.ones(5 * 32))


class TestPersistentDecode:
    @pytest.mark.parametrize("dtype", HALF_DTYPES)
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("heads", HEADS)
    def test_like_plain_pytorch_in_any_order(self, dtype, head_dim, heads):
        case, want, plain = shared_case(SAMPLES, heads, head_dim, dtype)
        calls = Calls()
        for seed in (0, 1, 2):
            calls.attention(case, True, seed=seed, kernel="persistent")
        result, *shuffled = calls.run()
        assert_attention(result, want, plain)
        assert all(same_bits(result, other) for other in shuffled)

    @pytest.mark.parametrize("fixed_split", [False, True])
    @pytest.mark.parametrize("multiprocessors", [1, 7, 132])
    def test_number_of_blocks(self, multiprocessors, fixed_split):
        """From a few long runs of tiles per block, over many units, to more blocks than there is work for."""
        case, want, plain = shared_case(SAMPLES, (7, 1), 64, torch.bfloat16)
        result = decode(case, multiprocessors=multiprocessors, fixed_split=fixed_split)
        assert_attention(result, want, plain)

    @pytest.mark.parametrize("fixed_split", [False, True])
    def test_more_parts_than_lanes(self, fixed_split):
        """More than 32 parts of equal and of fixed size, some of which no row of the second branch sees."""
        long = 9000 if fixed_split else 4500
        case = make_case([Group(1, long, 700), Group(1, 90, 700)], (7, 1), 128, torch.bfloat16)
        result = decode(case, multiprocessors=132, fixed_split=fixed_split)
        assert_attention(result, expected(case), expected(case, torch.bfloat16))

    @pytest.mark.parametrize("heads", [(28, 1), (64, 1), (20, 10)])
    @pytest.mark.parametrize("fixed_split", [False, True])
    def test_branches_and_heads_beyond_a_tile(self, heads, fixed_split):
        case = make_case([Group(1, 11 * i, 50) for i in range(7)], heads, 64, torch.bfloat16)
        assert_attention(decode(case, fixed_split=fixed_split), expected(case), expected(case, torch.bfloat16))

    def test_more_groups_than_threads(self):
        """Several groups per thread of the scan; some have no keys at all, at the beginning and the end too."""
        groups = [Group(1, i % 4 * 9, i // 2 % 3 * 5, sample=i // 2) for i in range(300)]
        case = make_case(groups, (2, 1), 64, torch.bfloat16)
        result = decode(case, multiprocessors=7)
        assert_attention(result, expected(case), expected(case, torch.bfloat16))
        assert (result[1][case.qo_rows[0]] == -math.inf).all()

    def test_no_keys(self):
        case = make_case([Group(1, 0), Group(1, 0)], (6, 2), 64, torch.bfloat16, spare_rows=0)
        out, lse = decode(case)
        assert (out == 0).all() and (lse == -math.inf).all()

    @pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
    def test_scale(self, scale):
        case = dataclasses.replace(make_case(SAMPLES[:3], (6, 2), 64, torch.float16), scale=scale)
        assert_attention(decode(case), expected(case), expected(case, torch.float16))

    def test_huge_scores(self):
        case = make_case(SAMPLES, (6, 2), 64, torch.bfloat16, spread=300.0)
        assert_attention(decode(case), expected(case), expected(case, torch.bfloat16))

    def test_strides_and_offsets(self):
        """Slots that are not head_dim apart, heads far apart, and q at addresses that no vector load takes."""
        case = make_case(SAMPLES[:5], (6, 2), 64, torch.bfloat16)

        def spaced(tensor, width, shift):
            wide = torch.full((*tensor.shape[:2], width), math.nan, dtype=tensor.dtype)
            wide[:, :, shift : shift + 64] = tensor
            return wide[:, :, shift : shift + 64]

        odd = dataclasses.replace(case, q=spaced(case.q, 67, 1), k=spaced(case.k, 72, 8), v=spaced(case.v, 80, 0))
        want = decode(case)
        assert same_bits(decode(odd), want)
        assert same_bits(decode(case, head_distance=2**31 + 64), want)

    @pytest.mark.parametrize("where", ["k", "v"])
    def test_nan_that_a_query_sees_is_not_hidden(self, where):
        case = make_case([Group(1, 200), Group(1, 30)], (6, 2), 64, torch.bfloat16, spare_rows=0)
        getattr(case, where)[:, int(case.key_ranges[0, 0]) + 150, 3] = math.nan
        out, _ = decode(case)
        hit, other = out[case.qo_rows[0]], out[case.qo_rows[1]]
        assert hit[:, 3].isnan().all() and other.isfinite().all()

    def test_without_lse_groups_or_rows(self):
        case = make_case(SAMPLES[:3], (6, 2), 64, torch.bfloat16)
        assert torch.equal(decode(case)[0], decode(case, return_lse=False)[0])
        out, lse = decode(make_case([], (6, 2), 64, torch.bfloat16))
        assert torch.equal(out, torch.zeros(3, 6, 64).bfloat16()) and torch.equal(lse, torch.full((3, 6), -math.inf))
        assert decode(make_case([], (6, 2), 64, torch.bfloat16, spare_rows=0))[0].shape == (0, 6, 64)


class TestFixedSplit:
    """The two branches of the first sample, alone and beside others."""

    GROUPS = [Group(1, 700, 90), Group(1, 333, 90), *(Group(1, 400 + 50 * i, sample=1 + i) for i in range(5))]

    @staticmethod
    def alone(case):
        """The first sample of a case, in the same pool."""
        return dataclasses.replace(case, qo_rows=case.qo_rows[:2], key_ranges=case.key_ranges[:2])

    @pytest.mark.parametrize("kernel", ["split", "persistent"])
    @pytest.mark.parametrize("fixed_split", [False, True])
    def test_the_neighbours_do_not_matter(self, kernel, fixed_split):
        case = make_case(self.GROUPS, (14, 2), 64, torch.bfloat16)
        rows = case.qo_rows[:2]
        options = {"kernel": kernel, "fixed_split": fixed_split, "multiprocessors": 16}
        first, second = attend(case, True, **options), attend(self.alone(case), True, **options)
        assert_attention(first, expected(case), expected(case, torch.bfloat16))
        assert same_bits([x[rows] for x in first], [x[rows] for x in second]) == fixed_split

    @pytest.mark.parametrize("kernel", ["split", "persistent"])
    def test_nor_do_they_for_a_sample_of_more_parts_than_a_group_gets(self, kernel):
        case = make_case([Group(1, 4500), Group(1, 40, sample=1)], (7, 1), 64, torch.bfloat16)
        first = dataclasses.replace(case, qo_rows=case.qo_rows[:1], key_ranges=case.key_ranges[:1])
        row = case.qo_rows[:1]
        results = [attend(which, True, kernel=kernel, fixed_split=True) for which in (case, first)]
        assert_attention(results[0], expected(case), expected(case, torch.bfloat16))
        assert same_bits(*([x[row] for x in result] for result in results))

    @pytest.mark.parametrize("kernel", ["split", "persistent"])
    def test_nor_does_the_device_or_the_size_of_the_pool(self, kernel):
        case = make_case(self.GROUPS, (14, 2), 64, torch.bfloat16)
        room = torch.full((2, 5000, 64), math.nan, dtype=torch.bfloat16)
        larger = dataclasses.replace(case, k=torch.cat([case.k, room], 1), v=torch.cat([case.v, room], 1))
        want = attend(case, True, kernel=kernel, fixed_split=True)
        assert same_bits(attend(larger, True, kernel=kernel, fixed_split=True, multiprocessors=132), want)
