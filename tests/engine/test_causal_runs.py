"""A prompt given at once, by torch's causal attention: what the op gives, in few calls. Others stay with the op."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fmd_ext
from attention_cases import Group, make_case
from fmd_ext import ops
from fmd_ext.engine import causal_runs
from fmd_ext.engine.causal_runs import CausalRuns, padded_size
from fmd_ext.ops import causal_attention, dispatch
from fmd_ext.ops.dispatch import Path, decide_prefill
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, VIDEO_AUDIO, build_inputs


@pytest.fixture
def sdpa():
    dispatch.select_prefill("sdpa")
    yield
    dispatch.select_prefill("auto")


@pytest.fixture
def sizes(monkeypatch):
    """Runs and their padded size, of every call of torch's causal attention."""
    seen, attend = [], causal_runs._attend
    monkeypatch.setattr(causal_runs, "_attend", lambda batch, *args: seen.append(batch.shape) or attend(batch, *args))
    return seen


def prompt(*samples, **kwargs):
    """One-shot groups: per sample the length of its prefix and of what sees it. Unused slots hold NaN."""
    groups = [Group(size, size, sample=number) for number, sample in enumerate(samples) for size in sample]
    case = make_case(groups, spare_rows=0, **kwargs)
    group = 0
    for sample in samples:
        for follower in range(group + 1, group + len(sample)):
            case.key_ranges[follower, 2:] = case.key_ranges[group, :2]
        group += len(sample)
    return case


def runs_of(case):
    arrays = (case.qo_rows, case.cu_seqlens_q, case.key_ranges)
    return CausalRuns.of(*(array.numpy() for array in arrays), num_rows=len(case.q))


SAMPLES = {
    "one run": [(33,)],
    "two branches": [(5, 60, 60)],
    "branches of two lengths": [(7, 50, 30)],
    "a batch": [(4, 70, 41), (20,), (9, 70, 70), (1,), (20,)],
    "no prefix": [(12,), (30,)],
}


@pytest.mark.parametrize("pads", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("heads", [(2, 2), (7, 1)])
def test_is_what_the_op_gives(samples, heads, pads, monkeypatch):
    monkeypatch.setattr(causal_runs, "pads", lambda device: pads)
    case = prompt(*samples, heads=heads, head_dim=40)
    out = runs_of(case).attend(case.q, case.k, case.v, case.scale)
    torch.testing.assert_close(out, ops.branched_prefill(*case.prefill_args())[0], rtol=1e-4, atol=1e-5)


def test_rows_in_order_are_not_gathered(monkeypatch):
    """Layers after the merge: q goes in as it is, padded at the end only."""
    case = prompt((100,), (100,))
    case.qo_rows = torch.arange(200)
    plain = runs_of(case)._arranged(is_padded=False)
    assert [batch.is_plain for batch in plain] == [True] and plain[0].shape == (2, 100) and plain[0].first_slot is None
    assert not runs_of(case)._arranged(is_padded=True)[0].is_plain  # padding between the samples
    one = prompt((100,))
    one.qo_rows = torch.arange(100)
    assert runs_of(one)._arranged(is_padded=True)[0].is_plain
    first_slots = [runs_of(one)._arranged(padded)[0].first_slot for padded in (False, True)]
    assert first_slots == [int(one.key_ranges[0, 0]), None]  # behind the keys lies what must not be read
    for padded in (False, True):
        monkeypatch.setattr(causal_runs, "pads", lambda device, padded=padded: padded)
        for given in (case, one):
            expected = ops.branched_prefill(*given.prefill_args())[0]
            out = runs_of(given).attend(given.q, given.k, given.v, given.scale)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_other_calls_stay_with_the_op():
    refused = {
        "earlier keys of its own": make_case([Group(10, 15)], spare_rows=0),
        "a prefix of an earlier call": make_case([Group(10, 10, prefix_len=6)], spare_rows=0),
        "queries that see nothing": make_case([Group(10, 6)], spare_rows=0),
        "a row in no group": make_case([Group(10, 10)], spare_rows=1),
        "no row": make_case([], spare_rows=0),
        "a long prefix": prompt((100, 10, 10)),
    }
    assert {why: runs_of(case) for why, case in refused.items()} == dict.fromkeys(refused)
    assert runs_of(prompt((100, 90, 90))) is not None


def test_few_sizes_are_seen():
    for size in range(1, 40_000, 7):
        padded = padded_size(size)
        assert size <= padded <= max(size + 64, size * 17 / 16)
    for power in (1 << 11, 1 << 14):
        assert len({padded_size(size) for size in range(power, 2 * power)}) <= 17


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_calls_of_a_patched_model(masking, thinker, sdpa, sizes):
    """A call per layer and length; a later chunk and each step run the op."""
    inputs = build_inputs([VIDEO_AUDIO])
    dispatch.select_prefill("op")
    fmd_ext.patch(thinker, fork_layers=2, masking=masking)
    by_op = thinker(**inputs)
    assert not sizes
    dispatch.select_prefill("sdpa")
    out = thinker(**inputs)
    torch.testing.assert_close(out.logits, by_op.logits, rtol=1e-4, atol=1e-4)
    layers = thinker.config.get_text_config().num_hidden_layers
    length, per_layer = inputs["input_ids"].shape[1], 1 if masking == "zero" else 2
    assert len(sizes) == 2 * per_layer + layers - 2
    assert sizes[2 * per_layer :] == [(1, length)] * (layers - 2)
    if masking == "zero":
        assert sizes[:2] == [(2, length)] * 2  # both branches at once
    sizes.clear()
    thinker(input_ids=torch.full((1, 3), 50), past_key_values=out.past_key_values)
    thinker(input_ids=torch.full((1, 1), 50), past_key_values=out.past_key_values)
    assert not sizes


def test_a_mixed_batch(thinker, sdpa):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO])
    fmd_ext.patch(thinker, fork_layers=2)
    mask = inputs["attention_mask"].bool()
    out = thinker(**inputs).logits[mask]
    dispatch.select_prefill("op")
    torch.testing.assert_close(out, thinker(**inputs).logits[mask], rtol=1e-4, atol=1e-4)


def test_which_path():
    why = "where torch's own operations run, causal attention without a mask is faster"
    assert decide_prefill(Path("torch", "no kernels"), (0, 0)) == Path("sdpa", why)
    assert decide_prefill(Path("kernel", ""), (0, 0)).name == "op"  # CPUs
    assert decide_prefill(Path("kernel", ""), (8, 0)).name == "op"
    assert decide_prefill(Path("kernel", ""), (9, 0)).name == decide_prefill(Path("kernel", ""), (10, 0)).name == "sdpa"
    cpu = torch.device("cpu")
    assert dispatch.prefill_path(cpu, torch.float32, 64).name == "op"
    with dispatch.selected("torch"):
        assert dispatch.prefill_path(cpu, torch.float32, 64).name == "sdpa"
    assert dispatch.prefill_path(cpu, torch.float32, 64).name == "op"
    with pytest.raises(ValueError, match=r"^unknown path of prefills 'cudnn'; accepted: auto, op, sdpa$"):
        dispatch.select_prefill("cudnn")


def none_available(*args, **settings):
    raise RuntimeError("No available kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trial_comes_first(dtype, monkeypatch, caplog):
    """Where torch's attention is wrong, or fails, the op runs, with a warning."""
    cpu, attend = torch.device("cpu"), F.scaled_dot_product_attention
    assert [causal_attention.problem(cpu, dtype, size) for size in (64, 128)] == ["", ""]
    wrong = {
        "differs by": lambda q, k, v, **settings: attend(q, k, v, **{**settings, "is_causal": False}),
        "failed: No available kernel": none_available,
    }
    for said, instead in wrong.items():
        causal_attention.problem.cache_clear()
        monkeypatch.setattr(F, "scaled_dot_product_attention", instead)
        caplog.clear()
        with dispatch.selected("torch"), caplog.at_level("WARNING"):
            path = dispatch.prefill_path(cpu, dtype, 64)
            dispatch.prefill_path(cpu, dtype, 64)
        assert path.name == "op" and said in path.why and len(caplog.records) == 1
    causal_attention.problem.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch's attention there did not run")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_gpu(head_dim):
    case = prompt((30, 1500, 1300), (1200,), heads=(14, 2), head_dim=head_dim, dtype=torch.bfloat16)
    out = runs_of(case).attend(case.q.cuda(), case.k.cuda(), case.v.cuda(), case.scale)
    expected = ops.branched_prefill(*case.prefill_args())[0]
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)


def test_short_runs_stay_with_the_kernels_of_cuda():
    arrays = np.arange(200), np.array([0, 200]), np.array([[0, 200, 0, 0]])
    runs = CausalRuns.of(*arrays, num_rows=200)
    assert runs.serves(torch.device("cpu")) and not runs.serves(torch.device("cuda"))
    long = np.arange(1024), np.array([0, 1024]), np.array([[0, 1024, 0, 0]])
    assert CausalRuns.of(*long, num_rows=1024).serves(torch.device("cuda"))
