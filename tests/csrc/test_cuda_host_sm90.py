"""What sm_90a adds, executed on the CPU: its prefill kernel and operations, and instructions against PTX's tables."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_ops_branched_prefill import MIXED

from attention_cases import HEADS, Group, assert_attention, expected, make_case, shared_case
from cuda_host import FAULT_SM90, Calls, build_driver

FAULTS = {
    "mbarrier that is not initialised": 1,
    "copy into a slot in use": 2,
    "copy that is not waited for": 3,
    "missing proxy fence": 4,
    "arrival that never comes": 5,
    "slot used before it is full": 6,
    "wgmma without a fence": 7,
    "slot released before the wait": 8,
    "result read before the wait": 9,
    "operand overwritten before the wait": 10,
    "missing barrier of a warpgroup": 11,
    # Of a kernel whose copies arrive at the mbarrier themselves, and whose reader fences.
    "missing fence of the reader": 13,
    "fence of the reader before its wait": 14,
    "arrival that does not wait for its copies": 15,
    "arrival issued before its copies": 16,
    "tracked copy that outlives its thread": 17,
    "tracked copy into a slot in use": 18,
}
RIGHT = {"the copying thread waits and fences": 0, "copies arrive and the reader fences": 12}


@pytest.fixture(scope="module", autouse=True)
def driver():
    build_driver()


def attend(case, **options):
    calls = Calls()
    calls.attention(case, **{"kernel": "sm90", **options})
    return calls.run()[0]


def same_bits(result, other):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(result, other, strict=True))


class TestHostExecution:
    """In many orders at once: an mbarrier lets go in so many ways that a mistake shows in few of them."""

    @staticmethod
    def run(fault):
        """Exit status, and 32 numbers per order."""
        calls = Calls()
        for seed in range(60):
            calls.fault(fault, seed, FAULT_SM90)
        said = calls.start()
        return said.returncode, torch.frombuffer(bytearray(said.stdout) or bytearray(4), dtype=torch.float32)

    @pytest.mark.parametrize("kernel", RIGHT)
    def test_right_kernel(self, kernel):
        status, result = self.run(RIGHT[kernel])
        assert status == 0 and torch.equal(result, torch.ones(60 * 32))

    @pytest.mark.parametrize("fault", FAULTS)
    def test_each_mistake_is_found(self, fault):
        status, result = self.run(FAULTS[fault])
        assert status != 0 or not torch.equal(result, torch.ones(60 * 32))


class TestPrefill:
    @pytest.mark.parametrize("heads,dtype", [*((heads, torch.bfloat16) for heads in HEADS), (HEADS[-1], torch.float16)])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_like_plain_pytorch_in_any_order(self, heads, dtype, head_dim):
        case, want, plain = shared_case(MIXED, heads, head_dim, dtype)
        calls = Calls()
        for seed in (2, 1):  # shuffled; 1 lets every product read its operands late
            calls.attention(case, seed=seed, kernel="sm90")
        first, *others = calls.run()
        assert_attention(first, want, plain)
        assert all(same_bits(first, other) for other in others)

    @pytest.mark.parametrize("length", [1, 17, 63, 64, 113, 129])
    def test_one_sample(self, length):
        case = make_case([Group(length, length)], (14, 2), 64, torch.bfloat16, seed=length, spare_rows=0)
        assert_attention(attend(case, seed=length), expected(case), expected(case, torch.bfloat16))

    def test_orders(self):
        """Many orders of a small grid, long enough to use every slot of the ring again."""
        case = make_case([Group(20, 600, 40)], (7, 1), 64, torch.float16)
        calls = Calls()
        for seed in range(10):
            calls.attention(case, seed=seed, kernel="sm90")
        first, *others = calls.run()
        assert_attention(first, expected(case), expected(case, torch.float16))
        assert all(same_bits(first, other) for other in others)

    @pytest.mark.parametrize(
        "groups",
        [
            [Group(300, 400, 40)],
            [Group(40, 0), Group(40, 70), Group(40, 0), Group(38, 300, 9)],  # of the first rows none sees a key
            [Group(150, 160), Group(1, 300), Group(17, 30), Group(3, 9)],  # most items have no rows: a block for each
        ],
    )
    def test_blocks_that_run_through_many_items(self, groups):
        """One block has them all, or each has its own; in orders in which the producer is ahead, and is not."""
        case = make_case(groups, (7, 1), 64, torch.bfloat16)
        calls = Calls()
        for seed, multiprocessors in ((0, 1), (1, 1), (2, 1), (4, 1), (1, 3), (1, 132)):
            calls.attention(case, seed=seed, multiprocessors=multiprocessors, kernel="sm90")
        first, *others = calls.run()
        assert_attention(first, expected(case), expected(case, torch.bfloat16))
        assert all(same_bits(first, other) for other in others)

    @pytest.mark.parametrize("heads", [(28, 1), (20, 10)])
    def test_branches_and_heads_beyond_a_tile(self, heads):
        case = make_case([Group(1, 11 * i, 50) for i in range(7)], heads, 64, torch.bfloat16)
        assert_attention(attend(case), expected(case), expected(case, torch.bfloat16))

    @pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
    def test_scale(self, scale):
        case = dataclasses.replace(make_case(MIXED[1:4], (6, 2), 64, torch.float16), scale=scale)
        assert_attention(attend(case), expected(case), expected(case, torch.float16))

    def test_huge_scores(self):
        case = make_case(MIXED, (6, 2), 64, torch.bfloat16, spread=300.0)
        assert_attention(attend(case), expected(case), expected(case, torch.bfloat16))

    def test_strides(self):
        """Pools whose slots are not head_dim apart, and q at addresses that no vector load takes."""
        case = make_case(MIXED[:5], (6, 2), 64, torch.bfloat16)

        def spaced(tensor, width, shift):
            wide = torch.full((*tensor.shape[:2], width), math.nan, dtype=tensor.dtype)
            wide[:, :, shift : shift + 64] = tensor
            return wide[:, :, shift : shift + 64]

        odd = dataclasses.replace(case, q=spaced(case.q, 67, 1), k=spaced(case.k, 72, 8), v=spaced(case.v, 80, 0))
        assert same_bits(attend(odd), attend(case))

    def test_offsets_beyond_2_to_the_31(self):
        case = make_case(MIXED[:3], (4, 2), 64, torch.bfloat16)
        assert same_bits(attend(case, head_distance=2**31 + 64), attend(case))

    @pytest.mark.parametrize("where", ["k", "v"])
    def test_nan_that_a_query_sees_is_not_hidden(self, where):
        case = make_case([Group(1, 200), Group(1, 30)], (6, 2), 64, torch.bfloat16, spare_rows=0)
        getattr(case, where)[:, int(case.key_ranges[0, 0]) + 150, 3] = math.nan
        out, _ = attend(case)
        hit, other = out[case.qo_rows[0]], out[case.qo_rows[1]]
        assert hit[:, 3].isnan().all() and other.isfinite().all()

    def test_without_lse_groups_or_rows(self):
        case = make_case(MIXED[:3], (6, 2), 64, torch.bfloat16)
        assert torch.equal(attend(case)[0], attend(case, return_lse=False)[0])
        out, lse = attend(make_case([], (6, 2), 64, torch.bfloat16))
        assert torch.equal(out, torch.zeros(3, 6, 64).bfloat16()) and torch.equal(lse, torch.full((3, 6), -math.inf))
        assert attend(make_case([], (6, 2), 64, torch.bfloat16, spare_rows=0))[0].shape == (0, 6, 64)

    @pytest.mark.parametrize(
        "dtype,head_dim,capability,said",
        [
            (torch.float32, 64, 90, "head_dim 64 of 32-bit elements, accepted on CUDA are head_dim 64 and 128 of bf"),
            (torch.bfloat16, 80, 90, "head_dim 80 of 16-bit elements, accepted on CUDA are"),
            (torch.bfloat16, 64, 80, "the kernel sm90 was chosen, which runs on compute capability 9.0; this device"),
        ],
    )
    def test_what_is_not_supported_is_refused(self, dtype, head_dim, capability, said):
        calls = Calls()
        calls.attention(make_case([Group(1, 1)], (2, 2), head_dim, dtype), kernel="sm90", capability=capability)
        process = calls.start()
        assert process.returncode == 2 and said.replace("of bf", "of bfloat16") in process.stderr.decode()


# ---- Instructions against the tables of the PTX ISA's chapters on mma, ldmatrix and wgmma (fragments, shared memory
# layouts). They are written down here once more, apart from what the host execution computes with. ----

# Row of an 8x8 pattern of 16-byte vectors: which vector of the row lies at each place ("128-byte swizzling").
SWIZZLE_128 = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (1, 0, 3, 2, 5, 4, 7, 6),
    (2, 3, 0, 1, 6, 7, 4, 5),
    (3, 2, 1, 0, 7, 6, 5, 4),
    (4, 5, 6, 7, 0, 1, 2, 3),
    (5, 4, 7, 6, 1, 0, 3, 2),
    (6, 7, 4, 5, 2, 3, 0, 1),
    (7, 6, 5, 4, 3, 2, 1, 0),
)


def mma_a(lane, i):
    """(row, column) of a_i, i = 0 to 7, of m16n8k16."""
    group, in_group = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, in_group * 2 + (i & 1) + (0 if i < 4 else 8)


def mma_b(lane, i):
    """(row, column) of b_i, i = 0 to 3."""
    group, in_group = lane >> 2, lane % 4
    return in_group * 2 + (i & 1) + (0 if i < 2 else 8), group


def mma_c(lane, i):
    """(row, column) of c_i, i = 0 to 3."""
    group, in_group = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), in_group * 2 + (i & 1)


def wgmma_d(thread, i):
    """(row, column) of d_i of m64nNk16: each warp has 16 rows, and 8 columns per four numbers."""
    warp, lane = thread // 32, thread % 32
    row, column = mma_c(lane, i % 4)
    return warp * 16 + row, column + i // 4 * 8


def words(matrix, place_of, threads, count):
    """int32 [128, count]: pairs of bfloat16 elements of `matrix`, the lower half first."""
    halves = torch.zeros(128, 2 * count, dtype=torch.bfloat16)
    for thread in range(threads):
        for i in range(2 * count):
            halves[thread, i] = matrix[place_of(thread, i)]
    return halves.view(torch.int32)


def by_table(result, place_of, threads, shape):
    """The matrix whose elements the threads hold; every element exactly once."""
    matrix = torch.full(shape, math.nan)
    for thread in range(threads):
        for i in range(result.shape[1]):
            assert matrix[place_of(thread, i)].isnan()
            matrix[place_of(thread, i)] = result[thread, i]
    assert not matrix.isnan().any()
    return matrix


def small(*shape, seed=0):
    """Whole numbers, so that sums of products are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def swizzled_panels(matrix):
    """[rows, columns] as panels of 64 columns, the vectors of each row in the order of the table: a flat image."""
    image = []
    for panel in matrix.split(64, dim=1):
        for r, row in enumerate(panel):
            vectors = row.view(8, 8)
            image += [vectors[vector] for vector in SWIZZLE_128[r % 8]]
    return torch.cat(image)


def run(instruction, numbers, **options):
    calls = Calls()
    for seed in (0, 1):
        calls.fragments(instruction, numbers, seed=seed, **options)
    results = calls.run()
    assert torch.equal(results[0][0], results[1][0])
    return results[0][0]


class TestInstructions:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_ldmatrix(self, transposed):
        """Register i holds matrix i, of which a lane has row lane / 4 and columns 2 (lane % 4) and the next."""
        memory = small(32, 8)  # the rows of four matrices
        got = run(1 if transposed else 0, 8, image=memory.flatten())
        for lane in range(32):
            for i in range(8):
                row, column = lane // 4, lane % 4 * 2 + i % 2
                matrix = memory[8 * (i // 2) : 8 * (i // 2) + 8].float()
                assert got[lane, i] == (matrix[column, row] if transposed else matrix[row, column])

    def test_mma(self):
        a, b = small(16, 16), small(16, 8, seed=1)
        got = run(2, 4, a=words(a, mma_a, 32, 4), b=words(b, mma_b, 32, 2))
        assert torch.equal(by_table(got, mma_c, 32, (16, 8)), a.float() @ b.float())

    @pytest.mark.parametrize("step", range(4))
    def test_wgmma_of_two_matrices_in_shared_memory(self, step):
        """K-major: rows of 64, of which the product takes 16 from 16 * step on."""
        a, b = small(64, 64), small(128, 64, seed=1)
        image = torch.cat([swizzled_panels(a), swizzled_panels(b)])
        begin = step * 16 * 2
        got = run(3, 64, image=image, places=(begin, a.numel() * 2 + begin, 0, 1024))
        columns = slice(16 * step, 16 * step + 16)
        want = a[:, columns].float() @ b[:, columns].float().T
        assert torch.equal(by_table(got, wgmma_d, 128, (64, 128)), want)

    @pytest.mark.parametrize("n", [64, 128])
    @pytest.mark.parametrize("step", [0, 1, 3])
    def test_wgmma_of_registers_and_a_transposed_matrix(self, n, step):
        """MN-major: 64 keys of n dims, in panels of 64 dims; the product takes 16 keys from 16 * step on."""
        a, b = small(64, 16), small(64, n, seed=1)

        def place(thread, i):
            row, column = mma_a(thread % 32, i)
            return thread // 32 * 16 + row, column

        begin = step * 2 * 1024
        got = run(
            4 if n == 64 else 5,
            n // 2,
            image=swizzled_panels(b),
            a=words(a, place, 128, 4),
            places=(0, begin, 64 * 128, 1024),
        )
        want = a.float() @ b[16 * step : 16 * step + 16].float()
        assert torch.equal(by_table(got, wgmma_d, 128, (64, n)), want)
