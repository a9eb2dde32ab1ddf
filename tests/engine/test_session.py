"""What a patch remembers is that of one call: threads, calls after `generate`, contexts in contexts."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.session import Session
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import AUDIO_VIDEO, INTERLEAVED, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, build_inputs

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}


@pytest.mark.parametrize("runner", [False, True])
def test_threads_take_turns(thinker, runner):
    """Four threads with prompts of different lengths: each gets what it would get alone."""
    fmd_ext.patch(thinker, fork_layers=2, runner=runner)
    prompts = [build_inputs([sample]) for sample in (VIDEO_AUDIO, AUDIO_VIDEO, INTERLEAVED, TWO_CLIPS)]
    expected = [thinker.generate(**inputs, **GREEDY).tolist() for inputs in prompts]
    found, start = [[] for _ in prompts], threading.Barrier(len(prompts))

    def ask(index):
        start.wait()
        with torch.no_grad():
            for _ in range(2):
                found[index].append(thinker.generate(**prompts[index], **GREEDY).tolist())
                thinker(**prompts[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[tokens, tokens] for tokens in expected]


def test_labels_by_hand_are_those_of_the_thread(thinker):
    """A thread that calls while another is in a context with labels waits, and does not get them."""
    inputs = build_inputs([VIDEO_AUDIO])
    handle = fmd_ext.patch(thinker, fork_layers=2)
    expected, found = thinker(**inputs).logits, []

    def call():
        with torch.no_grad():
            found.append(thinker(**inputs).logits)

    thread = threading.Thread(target=call)
    with handle.labels(torch.zeros_like(inputs["input_ids"])):
        thread.start()
        thread.join(0.2)
        assert found == [] and not torch.equal(thinker(**inputs).logits, expected)
    thread.join()
    assert torch.equal(found[0], expected)


def test_labels_in_a_context_give_way_to_those_around_it(thinker):
    """The inner context's labels end with it; then the outer one's hold again."""
    inputs = build_inputs([VIDEO_AUDIO])
    handle = fmd_ext.patch(thinker, fork_layers=2)
    length = inputs["input_ids"].shape[1]
    with handle.labels(torch.zeros(1, length, dtype=torch.long)):
        with handle.labels(torch.arange(length)[None] % 3):
            thinker(**inputs)
            assert handle.last_plan.forked.all()
        thinker(**inputs)
        assert not handle.last_plan.forked.any()
    thinker(**inputs)
    assert handle.last_plan.forked.all()


def test_branches_in_a_context_give_way_to_those_around_it():
    session = Session(FMDConfig())
    outer, inner = torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4)
    with session.labels([[0, 3, 0]]), session.branches(outer, 0):
        with session.branches(inner, 0), session.branches(None, 0):
            assert session.branches_for(1, 0, 3) is not None and session.branches_for(1, 0, 3).all()
        assert not session.branches_for(1, 0, 3).any()
    assert session.branches_for(1, 0, 3) is None


def test_a_mask_after_generate_is_read_again(thinker):
    """Within `generate` a new token is known to be none of padding; afterwards the caller's mask decides."""
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    handle = fmd_ext.patch(thinker, fork_layers=2)
    thinker.generate(**inputs, **GREEDY)
    cache = thinker(**inputs).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [0]])], dim=1)
    thinker.get_decoder()(input_ids=torch.tensor([[40], [41]]), attention_mask=mask, past_key_values=cache)
    assert handle.last_plan.num_home == 1


def test_a_patched_model_is_not_pickled():
    thinker = tiny_thinker()  # its own: hooks of transformers, which stay in a model once used, cannot be pickled
    fmd_ext.patch(thinker)
    with pytest.raises(TypeError, match="a patched model cannot be pickled.*unpatch it first"):
        pickle.dumps(thinker)
    fmd_ext.unpatch(thinker)
