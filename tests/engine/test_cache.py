"""The branched cache: growth in place, copies, and everything transformers may ask of a cache."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

import fmd_ext
from fmd_ext.engine import cache as cache_module
from fmd_ext.engine.cache import BranchedState
from fmd_ext.engine.segments import SegmentTable
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, VIDEO_AUDIO, VIDEO_ONLY, build_inputs


def test_segments_never_overlap_and_keep_their_keys():
    table = SegmentTable(batch=3, segments=3)
    random = np.random.default_rng(0)
    for _ in range(20):
        needed = table.length + random.integers(0, 40, (3, 3))
        grown = table.resized(needed, growing=random.random((3, 3)) < 0.5)
        assert (grown.capacity >= needed).all() and (grown.length == table.length).all()
        stops = (grown.start + grown.capacity).ravel()
        assert (grown.start.ravel()[1:] == stops[:-1]).all() and stops[-1] == grown.num_slots
        assert len(grown.slots_in_use()) == grown.length.sum()
        table = grown
        table.length = needed


def test_room_grows_geometrically():
    """A token at a time, 10,000 times: the cache moves a few dozen times only."""
    table, moves = SegmentTable(1, 1), 0
    for length in range(1, 10_001):
        needed = np.array([[length]])
        if (needed > table.capacity).any():
            table, moves = table.resized(needed, np.array([[True]])), moves + 1
        table.length = needed
    assert moves < 30 and table.num_slots < 1.3 * 10_000


def step(model, cache, token):
    return model(input_ids=torch.as_tensor(token), past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_many_steps_across_moves(thinker, masking):
    """200 tokens, beyond the first headroom of every segment, equal the same tokens in one call."""
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2, masking=masking)
    words = torch.randint(20, 260, (1, 200), generator=torch.Generator().manual_seed(0))
    cache = thinker(**inputs).past_key_values
    together = thinker(input_ids=words, past_key_values=copy.deepcopy(cache)).logits
    pools = {id(cache.layers[0].keys)}
    for i in range(200):
        logits = step(thinker, cache, words[:, i : i + 1])
        torch.testing.assert_close(logits, together[:, i], atol=1e-4, rtol=0)
        pools.add(id(cache.layers[0].keys))
    assert 1 < len(pools) < 6


@pytest.fixture
def compared(monkeypatch):
    """Every plan that follows from the last one is compared with the planner's. Gives a list with an item for each."""
    made, original, compared = [], cache_module.make_plan, []
    monkeypatch.setattr(cache_module, "make_plan", lambda *args: made.append(1) or original(*args))
    plan_call, host = BranchedState.plan_call, torch.device("cpu")

    def beside_the_planner(state, *args):
        count, last = len(made), state._last_step
        plan = plan_call(state, *args)
        if len(made) == count:
            state._last_step = None
            planned, given = plan_call(state, *args), dataclasses.asdict(plan)
            state._last_step, state._next = last, None
            expected = dataclasses.asdict(planned)
            assert plan.tensors._places == planned.tensors._places
            for name in plan.tensors._places:
                own, other = plan.tensors.get(name, host), planned.tensors.get(name, host)
                assert torch.equal(own, other), name
            for name in ("fork", "trunk", "tensors"):
                del given[name], expected[name]
            np.testing.assert_equal(given, expected)
            for kind in ("fork", "trunk"):
                step = getattr(plan, kind)
                assert (step.max_qo_len, step.kind) == (1, kind) and step.arrays is plan.tensors
            compared.append(1)
        return plan

    monkeypatch.setattr(BranchedState, "plan_call", beside_the_planner)
    return compared


def steps(model, cache, count):
    for _ in range(count):
        model(input_ids=torch.full((cache.layers[0].state.batch, 1), 50), past_key_values=cache)


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_a_step_behind_a_step_has_the_plan_that_the_planner_makes(thinker, masking, compared):
    """Its plan follows from the last one, through moves, crops, other samples and calls of several positions."""
    fmd_ext.patch(thinker, fork_layers=2, masking=masking)
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO])
    cache = thinker(**inputs).past_key_values
    steps(thinker, cache, 100)
    assert 90 < len(compared) < 100  # the first, and those that move the keys, are planned
    cache.crop(-3)
    steps(thinker, cache, 2)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    steps(thinker, copy.deepcopy(cache), 2)
    thinker(input_ids=torch.full((3, 4), 50), past_key_values=cache)
    count = len(compared)
    steps(thinker, cache, 3)
    assert len(compared) == count + 2


def fails(decoder, cache, call):
    hook = decoder.layers[2].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder(**call, past_key_values=cache)
    hook.remove()


BETWEEN_STEPS = {
    "repeated": lambda decoder, cache, call: cache.batch_repeat_interleave(2),
    "selected": lambda decoder, cache, call: cache.batch_select_indices(torch.tensor([1, 0])),
    "failed": fails,
    "padded": lambda decoder, cache, call: decoder(
        **call, past_key_values=cache, attention_mask=torch.tensor([[1], [0], [1]])
    ),
    "other positions": lambda decoder, cache, call: decoder(
        **call, past_key_values=cache, position_ids=torch.full((3, 3, 1), 500)
    ),
    "a clip": lambda decoder, cache, call: decoder(
        inputs_embeds=call["inputs_embeds"].expand(-1, 5, -1),
        past_key_values=cache,
        modality_labels=[[0] * cache.get_seq_length() + [1, 1, 2, 2, 0]] * 3,
    ),
    "a picture": lambda decoder, cache, call: decoder(
        **call, past_key_values=cache, modality_labels=[[0] * cache.get_seq_length() + [1]] * 3
    ),
    "emptied": lambda decoder, cache, call: (cache.reset(), decoder(**call, past_key_values=cache)),
}


@pytest.mark.parametrize("event", BETWEEN_STEPS)
@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_steps_go_on_from_what_came_between(thinker, masking, event, compared):
    """Of samples in the fork, with one modality, and with none."""
    fmd_ext.patch(thinker, fork_layers=2, masking=masking)
    cache = thinker(**build_inputs([VIDEO_AUDIO, TEXT_ONLY, VIDEO_ONLY])).past_key_values
    steps(thinker, cache, 3)
    embeds = torch.randn(3, 1, thinker.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    BETWEEN_STEPS[event](thinker.get_decoder(), cache, {"inputs_embeds": embeds})
    count = len(compared)
    for _ in range(4):
        embeds = embeds[:1].expand(cache.layers[0].state.batch, -1, -1)
        thinker.get_decoder()(inputs_embeds=embeds, past_key_values=cache)
    assert len(compared) >= count + 3


def test_what_is_announced_opens_the_fork(thinker, compared):
    """Steps through a prompt whose labels say that a clip follows: each is what the planner makes of it."""
    handle = fmd_ext.patch(thinker, fork_layers=2)
    decoder, word = thinker.get_decoder(), torch.zeros(1, 1, thinker.config.text_config.hidden_size)
    cache = decoder(inputs_embeds=word.expand(-1, 4, -1)).past_key_values
    for _ in range(2):
        decoder(inputs_embeds=word, past_key_values=cache)
    with handle.labels([[0] * 8 + [1, 2]]):
        for _ in range(2):
            decoder(inputs_embeds=word, past_key_values=cache)
        assert cache.layers[0].state.phase.tolist() == [cache_module.PREFIX_OPEN]
    assert len(compared) == 1  # the second step, of which nothing is announced


def test_a_copy_goes_its_own_way(thinker):
    fmd_ext.patch(thinker, fork_layers=2)
    cache = thinker(**build_inputs([VIDEO_AUDIO])).past_key_values
    twin = copy.deepcopy(cache)
    expected = step(thinker, twin, [[40]])
    step(thinker, cache, [[99]])
    assert (twin.get_seq_length(), cache.get_seq_length()) == (32, 32)
    twin.crop(-1)
    torch.testing.assert_close(step(thinker, twin, [[40]]), expected, atol=1e-5, rtol=0)


def test_samples_are_selected_repeated_and_reordered(thinker):
    fmd_ext.patch(thinker, fork_layers=2)
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO])
    mask = torch.ones(3, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    mask[:, :-1] = inputs["attention_mask"]
    full = thinker(**inputs).past_key_values
    deltas = (thinker if hasattr(thinker, "rope_deltas") else thinker.model).rope_deltas

    def logits(cache, tokens, samples):
        positions = mask[samples].sum(-1)[None, :, None] - 1 + deltas[samples][None]
        call = {"attention_mask": mask[samples], "position_ids": positions.expand(3, -1, -1), "past_key_values": cache}
        return thinker(input_ids=tokens, **call).logits[:, -1]

    tokens = torch.tensor([[30], [31], [32]])
    expected = logits(copy.deepcopy(full), tokens, [0, 1, 2])
    for action, samples in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]:
        cache = copy.deepcopy(full)
        action(cache)
        torch.testing.assert_close(logits(cache, tokens[samples], samples), expected[samples], atol=1e-5, rtol=0)


def test_crop_gives_back_text_only(thinker):
    fmd_ext.patch(thinker, fork_layers=2)
    cache = thinker(**build_inputs([VIDEO_AUDIO])).past_key_values  # its last eight positions are text
    expected = step(thinker, copy.deepcopy(cache), [[40]])
    for token in (50, 51, 52):
        step(thinker, cache, [[token]])
    cache.crop(-3)
    torch.testing.assert_close(step(thinker, cache, [[40]]), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot crop 10 positions: only the last 9 are text"):
        cache.crop(-10)
    with pytest.raises(ValueError, match="crop takes minus the number"):
        cache.crop(3)
    assert cache.get_seq_length() == 32


def test_reset_starts_anew(thinker):
    fmd_ext.patch(thinker, fork_layers=2)
    inputs = build_inputs([VIDEO_AUDIO])
    out = thinker(**inputs)
    out.past_key_values.reset()
    assert out.past_key_values.get_seq_length() == 0
    again = thinker(**inputs, past_key_values=out.past_key_values)
    assert torch.equal(again.logits, out.logits)
