"""The ops on a real CUDA device: the cases of the CPU ops, streams, graphs, devices. Skipped where there is none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_ops_branched_decode import SAMPLES
from test_ops_branched_prefill import MIXED
from test_ops_rope_append import assert_rotated
from test_ops_rope_append import make as make_rope_append

import fmd_kernel_sources as sources
from attention_cases import HEADS, Group, assert_as_exact, assert_attention, expected, make_case, shared_case
from fmd_ext import ops
from fmd_ext.ops import dispatch, library, selftest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CUDA ops did not run on one"),
]

HALF_DTYPES = [torch.bfloat16, torch.float16]
TENSORS = ("q", "k", "v", "qo_rows", "cu_seqlens_q", "key_ranges")


@pytest.fixture(scope="module", autouse=True)
def _library_is_loaded():
    cuda = library.load()["cuda"]
    assert cuda.loaded, f"there is a CUDA device, but no CUDA op library: {cuda.reason}"


def to_device(case, device="cuda"):
    """Strides are kept."""
    moved = {}
    for name in TENSORS:
        tensor = getattr(case, name)
        target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        moved[name] = target.copy_(tensor)
    return dataclasses.replace(case, **moved)


def attend(case, decode, **options):
    op, args = (ops.branched_decode, case.decode_args) if decode else (ops.branched_prefill, case.prefill_args)
    return op(*args(**options))


def on_host(result):
    return tuple(tensor.cpu() for tensor in result)


def kernels_of(*operators):
    """(op, kernel) of every CUDA kernel of these ops."""
    return [(kernel.op, kernel.name) for kernel in sources.kernels() if kernel.op in operators]


def each_kernel(*operators):
    """Runs a test with each CUDA kernel of some ops; skips those that this device cannot run."""
    pairs = kernels_of(*operators)
    return pytest.mark.parametrize("kernel", pairs, ids=["-".join(pair) for pair in pairs], indirect=True)


both_ops = each_kernel("branched_prefill", "branched_decode")


@pytest.fixture
def kernel(request):
    """Chooses a kernel, (op, name). Gives its name."""
    op, name = request.param
    needs = next(k.capability for k in library.cuda_kernels() if (k.op, k.name) == (op, name))
    major, minor = torch.cuda.get_device_capability()
    if needs not in (0, 10 * major + minor):
        pytest.skip(f"compute capability {major}.{minor}: the kernel {name} of {op} did not run on one")
    library.select_cuda_kernel(op, name)
    yield name
    library.select_cuda_kernel(op, "auto")


@pytest.fixture
def decode(request, kernel):
    """Whether the kernel is one of branched_decode."""
    return request.node.callspec.params["kernel"][0] == "branched_decode"


@both_ops
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [*HEADS, (28, 4), (28, 1), (64, 1)])
def test_attention(decode, dtype, head_dim, heads):
    case, want, plain = shared_case(SAMPLES if decode else MIXED, heads, head_dim, dtype)
    assert_attention(on_host(attend(to_device(case), decode)), want, plain)


@both_ops
@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_scale(decode, scale):
    case = dataclasses.replace(make_case(SAMPLES if decode else MIXED, (6, 2), 64, torch.float16), scale=scale)
    assert_attention(on_host(attend(to_device(case), decode)), expected(case), expected(case, torch.float16))


# Keys per tile of the prefill kernels, kKeys of their shapes.
TILE_KEYS = {"sm80": 64, "sm90": 128}


def lse_rounding(case, tile_keys):
    """The absolute error of lse that the sum of weights may have: the worst case of every step of a prefill kernel.

    An error of the sum relative to the sum is an absolute error of its logarithm.
    - Each tile multiplies the running sum by 2^(m' s - fl(m s)): m' and m are the largest score before and after it, s
      the scale in base 2. nvcc fuses the product m' s with the difference, so the rounding error of fl(m s) remains,
      also where m' = m: half a unit in the last place of the largest score, once per tile.
    - ex2.approx errs by 2 units in the last place (exp2f in the CUDA C++ Programming Guide): in the factor of each
      tile, and once in each weight.
    - A lane adds the quarter of a tile's weights that it holds one by one, then the tiles, then those of four lanes.
    """
    half_unit, ex2 = 2.0**-24, 2.0**-22
    num_keys = int(case.key_ranges[:, 1::2].sum(1).max())
    tiles = math.ceil(num_keys / tile_keys)
    heads_per_kv = case.q.shape[1] // case.k.shape[0]
    k = case.k.float().nan_to_num(0.0)  # unused slots
    scores = (
        case.q[case.qo_rows, head].float() @ k[head // heads_per_kv].T * case.scale for head in range(case.q.shape[1])
    )
    largest = max(score.abs().max().item() for score in scores)
    additions = tile_keys // 4 - 1 + tiles + 2
    return tiles * (largest * half_unit + ex2) + ex2 + additions * half_unit


@each_kernel("branched_prefill")
def test_long_prefill(kernel):
    """Branches of 3,000 queries over a prefix: several waves of blocks."""
    case = make_case([Group(2500, 2600, 300), Group(3001, 3001, 300)], (14, 2), 128, torch.bfloat16)
    rounding = lse_rounding(case, TILE_KEYS[kernel])
    assert rounding < 1e-4 < 1 / 3301, "one key that is left out or counted twice must still show"
    want, plain = expected(case), expected(case, torch.bfloat16)
    assert_attention(on_host(attend(to_device(case), False)), want, plain, rounding)


@each_kernel("branched_decode")
def test_long_decode(kernel):
    groups = [Group(1, 9000, 700, sample=i // 2) for i in range(6)]
    case = make_case(groups, (28, 4), 128, torch.bfloat16)
    assert_attention(on_host(attend(to_device(case), True)), expected(case), expected(case, torch.bfloat16))


@both_ops
def test_without_lse_and_without_groups(decode):
    case = to_device(make_case(SAMPLES if decode else MIXED, (6, 2), 64, torch.bfloat16))
    out, lse = attend(case, decode, return_lse=False)
    assert lse.shape == (0,) and torch.equal(out, attend(case, decode)[0])
    out, lse = attend(to_device(make_case([], (6, 2), 64, torch.bfloat16)), decode)
    assert (out == 0).all() and (lse == -math.inf).all()


@each_kernel("branched_decode")
def test_a_fixed_split_makes_a_sample_independent_of_its_neighbours(kernel):
    groups = [Group(1, 900 + 100 * i, 64, sample=i // 2) for i in range(40)]
    case = to_device(make_case(groups, (28, 4), 128, torch.bfloat16))
    arguments = case.qo_rows[:2], case.key_ranges[:2], case.scale
    whole = ops.branched_decode(case.q, case.k, case.v, case.qo_rows, case.key_ranges, case.scale, fixed_split=True)[0]
    alone = ops.branched_decode(case.q, case.k, case.v, *arguments, fixed_split=True)[0]
    assert torch.equal(whole[case.qo_rows[:2]], alone[case.qo_rows[:2]])


@both_ops
def test_same_bits_every_time(decode):
    case = to_device(make_case(SAMPLES if decode else MIXED, (14, 2), 128, torch.bfloat16))
    first = on_host(attend(case, decode))
    for _ in range(20):
        again = on_host(attend(case, decode))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@both_ops
def test_another_stream(decode):
    """What the op reads is written on the same stream just before, behind work that takes a while."""
    case = to_device(make_case(SAMPLES if decode else MIXED, (14, 2), 64, torch.bfloat16))
    want = on_host(attend(case, decode))
    late = dataclasses.replace(case, q=torch.zeros_like(case.q))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.q.copy_(case.q)
        result = attend(late, decode)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(on_host(result), want, strict=True))


@each_kernel("branched_decode")
def test_graph_of_a_decode_step(kernel):
    """append_, branched_decode and merge_ captured once; replayed with other lengths in the same tensors."""
    case = to_device(make_case([Group(1, 64, 16), Group(1, 64, 16)], (14, 2), 64, torch.bfloat16, spare_rows=0))
    case.k.nan_to_num_(0.0), case.v.nan_to_num_(0.0)
    hidden = torch.randn(2, 14 * 64, device="cuda").bfloat16()
    new_k, new_v = torch.randn(2, 2, 2, 64, device="cuda").bfloat16()
    slots = case.key_ranges[:, 0] + case.key_ranges[:, 1] - 1
    rows = torch.tensor([0, 1], device="cuda")
    weights = torch.tensor([0.5], device="cuda")

    def step(k, v, hidden, key_ranges, slots):
        ops.append_(k, v, new_k, new_v, slots)
        out, _ = ops.branched_decode(case.q, k, v, case.qo_rows, key_ranges, case.scale)
        hidden += out.reshape(2, -1)
        ops.merge_(hidden, rows[:1], rows[1:], weights)

    def copies():
        return case.k.clone(), case.v.clone(), hidden.clone()

    static = copies()
    key_ranges, static_slots = case.key_ranges.clone(), slots.clone()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step(*copies(), key_ranges, static_slots)
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*static, key_ranges, static_slots)
    for length in (1, 33, 64):
        key_ranges[:, 1] = length
        static_slots.copy_(key_ranges[:, 0] + length - 1)
        for target, source in zip(static, (case.k, case.v, hidden), strict=True):
            target.copy_(source)
        graph.replay()
        eager = copies()
        step(*eager, key_ranges, static_slots)
        assert all(torch.equal(a, b) for a, b in zip(static, eager, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: the device guard was not tested")
@both_ops
def test_a_device_that_is_not_current(decode):
    case, want, plain = shared_case(SAMPLES if decode else MIXED, (7, 1), 64, torch.bfloat16)
    with torch.cuda.device(0):
        result = attend(to_device(case, "cuda:1"), decode)
        assert torch.cuda.current_device() == 0
    assert result[0].device == torch.device("cuda:1")
    assert_attention(on_host(result), want, plain)


@both_ops
def test_offsets_beyond_2_to_the_31(decode):
    """The second kv head lies 2^31 elements and more into the pool."""
    num_slots, dim = 2**31 // 128 + 512, 128
    if torch.cuda.mem_get_info()[0] < 5 * 2 * num_slots * dim * 2:
        pytest.skip("less than 40 GB of free device memory: large offsets were not tested")
    small = make_case([Group(1, 300, 100), Group(1, 77, 100)], (8, 2), dim, torch.bfloat16)
    case = to_device(small)
    shift = num_slots - small.k.shape[1]
    pools = []
    for pool in (case.k, case.v):
        large = torch.empty(2, num_slots, dim, dtype=torch.bfloat16, device="cuda")
        large[:, shift:] = pool
        pools.append(large)
    key_ranges = case.key_ranges + shift * torch.tensor([1, 0, 1, 0], device="cuda")
    moved = dataclasses.replace(case, k=pools[0], v=pools[1], key_ranges=key_ranges)
    assert_attention(on_host(attend(moved, decode)), expected(small), expected(small, torch.bfloat16))


@each_kernel("append_")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_append(kernel, dtype, head_dim):
    pools = [torch.randn(4, 100, head_dim, device="cuda").to(dtype) for _ in range(2)]
    slots = torch.randperm(100, device="cuda")[:63]
    k = torch.randn(4, 63, head_dim, device="cuda").to(dtype).transpose(0, 1)
    v = torch.randn(63, 4, head_dim + 3, device="cuda").to(dtype)[..., 3:]
    want = [pool.clone() for pool in pools]
    want[0][:, slots], want[1][:, slots] = k.transpose(0, 1), v.transpose(0, 1)
    ops.append_(*pools, k, v, slots)
    assert torch.equal(pools[0], want[0]) and torch.equal(pools[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("hidden_size", [63, 3584])
def test_merge(dtype, hidden_size):
    hidden = torch.randn(40, hidden_size, device="cuda").to(dtype)
    home_rows, away_rows = torch.randperm(40, device="cuda")[:34].view(2, 17)
    weights = torch.rand(17, device="cuda")
    exact = hidden.double()
    exact[home_rows] = weights[:, None] * exact[home_rows] + (1 - weights[:, None]) * exact[away_rows]
    ops.merge_(hidden, home_rows, away_rows, weights)
    assert_as_exact(hidden, exact.to(dtype), exact, dtype)


@each_kernel("rope_append_")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("heads,head_dim", [((2, 1), 8), ((6, 2), 40), ((28, 4), 128)])
def test_rope_append(kernel, dtype, heads, head_dim):
    for angle_dtype in {dtype, torch.float32}:
        case = make_rope_append(63, heads, head_dim, dtype, angle_dtype)
        moved = {name: tensor.cuda() for name, tensor in case.items()}
        ops.rope_append_(**moved)
        assert_rotated(case, {name: tensor.cpu() for name, tensor in moved.items()})


@both_ops
@pytest.mark.parametrize(
    "dtype,head_dim,said",
    [
        (torch.float32, 64, "q has dtype Float, accepted on CUDA are BFloat16 and Half"),
        (torch.bfloat16, 80, "q has head_dim 80, accepted on CUDA are 64 and 128"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(decode, dtype, head_dim, said):
    case = to_device(make_case([Group(1, 1)], (2, 2), head_dim, dtype))
    with dispatch.selected("kernel"), pytest.raises(ValueError, match=said):
        attend(case, decode)


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    "dtype,head_dim",
    [(torch.float32, 64), (torch.float64, 64), (torch.bfloat16, 80), (torch.bfloat16, 96), (torch.float16, 256)],
)
def test_what_the_kernels_do_not_take_runs_by_torchs_operations(decode, dtype, head_dim):
    case = make_case(SAMPLES if decode else MIXED, (6, 2), head_dim, dtype)
    assert_attention(on_host(attend(to_device(case), decode)), expected(case), expected(case, dtype))


def test_the_check_before_a_first_use_passes_here():
    assert selftest.problems(torch.device("cuda")) == []


@both_ops
def test_misaligned_pools_are_refused(decode):
    case = to_device(make_case([Group(1, 1)], (2, 2), 64, torch.bfloat16))
    wide = torch.zeros(2, case.k.shape[1], 67, dtype=torch.bfloat16, device="cuda")[..., :64]
    with pytest.raises(ValueError, match=r"k has strides \[\d+, 67, 1\] .* accepted on CUDA are multiples of 8"):
        attend(dataclasses.replace(case, k=wide), decode)


@both_ops
def test_mixed_devices_are_refused(decode):
    case = to_device(make_case([Group(1, 1)], (2, 2), 64, torch.bfloat16))
    with pytest.raises(ValueError, match="qo_rows is on cpu, accepted is cuda:0 as for q"):
        attend(dataclasses.replace(case, qo_rows=case.qo_rows.cpu()), decode)
