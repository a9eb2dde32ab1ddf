"""The branched cache: growth in place, copies, and everything transformers may ask of a cache."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fmd_ext
from fmd_ext.engine.segments import SegmentTable
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, VIDEO_AUDIO, build_inputs


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
