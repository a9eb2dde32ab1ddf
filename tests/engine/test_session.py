"""What a patch remembers is that of one call: threads, calls after `generate`, contexts in contexts."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import fmd_ext
from fmd_ext.compat import cache_kwargs
from fmd_ext.engine.prompt import Prompt, check_labels
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_thinker
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
            assert handle.last_call.plan.forked.all()
        thinker(**inputs)
        assert not handle.last_call.plan.forked.any()
    thinker(**inputs)
    assert handle.last_call.plan.forked.all()


def test_branches_belong_to_a_prompts_positions():
    embeds = torch.arange(12.0).view(2, 1, 3, 2)
    prompt = Prompt(check_labels([[0, 3, 3, 0]]))
    with_branches = prompt.with_branches(embeds, 1)
    assert prompt.branches_for(1, 0, 4) is None and with_branches.is_one_with(prompt)
    assert torch.equal(with_branches.branches_for(1, 2, 4), embeds[:, :, 1:])
    assert torch.equal(with_branches.branches_for(2, 1, 1), embeds[:, [0, 0], :1])
    with pytest.raises(ValueError, match="branch_embeds are read at joint positions only"):
        Prompt(check_labels([[0, 1, 2, 0]])).with_branches(embeds, 0)


def test_a_mask_after_generate_is_read_again(thinker):
    """Within `generate` a new token is known to be none of padding; afterwards the caller's mask decides."""
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    handle = fmd_ext.patch(thinker, fork_layers=2)
    thinker.generate(**inputs, **GREEDY)
    cache = thinker(**inputs).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [0]])], dim=1)
    thinker.get_decoder()(input_ids=torch.tensor([[40], [41]]), attention_mask=mask, past_key_values=cache)
    assert handle.last_call.plan.num_home == 1


def test_a_patched_model_is_not_pickled():
    thinker = tiny_thinker()  # its own: hooks of transformers, which stay in a model once used, cannot be pickled
    fmd_ext.patch(thinker)
    with pytest.raises(TypeError, match="a patched model cannot be pickled.*unpatch it first"):
        pickle.dumps(thinker)
    fmd_ext.unpatch(thinker)


class SecondPass(LogitsProcessor):
    """What guidance does: logits of another prompt, by a call of the same model, at every step."""

    def __init__(self, model, **inputs):
        self.model, self.inputs, self.seen = model, inputs, []

    def __call__(self, ids, scores):
        self.seen.append(self.model(**self.inputs).logits[:, -1])
        return scores


class TestLabelsBelongToTheirIds:
    """A call of the model within `generate` is labelled by what it brings, not by the outer prompt."""

    @pytest.mark.parametrize("runner", [False, True])
    @pytest.mark.parametrize("other", [TEXT_ONLY, AUDIO_VIDEO, VIDEO_AUDIO], ids=["text", "clip", "same shape"])
    def test_read_from_ids(self, thinker, other, runner):
        prompt, inputs = build_inputs([VIDEO_AUDIO]), build_inputs([other], seed=5)
        fmd_ext.patch(thinker, fork_layers=2, runner=runner)
        expected, tokens = thinker(**inputs).logits[:, -1], thinker.generate(**prompt, **GREEDY)
        second = SecondPass(thinker, **inputs)
        again = thinker.generate(**prompt, **GREEDY, logits_processor=LogitsProcessorList([second]))
        assert torch.equal(again, tokens) and len(second.seen) == GREEDY["max_new_tokens"]
        for logits in second.seen:
            torch.testing.assert_close(logits, expected)

    def test_given_by_hand(self):
        model = tiny_llama()
        ids, other = torch.randint(5, 90, (1, 20)), torch.randint(5, 90, (1, 18))
        expected = model(input_ids=other).logits[:, -1]
        fmd_ext.patch(model, adapter="text", fork_layers=2)
        second = SecondPass(model, input_ids=other)
        labels = torch.tensor([[0] * 4 + [1] * 6 + [2] * 6 + [0] * 4])
        model.generate(input_ids=ids, modality_labels=labels, **GREEDY, logits_processor=LogitsProcessorList([second]))
        torch.testing.assert_close(second.seen[-1], expected, atol=1e-4, rtol=1e-4)

    def test_the_prompt_without_its_features_is_text(self, thinker):
        """Contrastive decoding without the clip: the same ids, of which the placeholders bring nothing."""
        prompt = build_inputs([VIDEO_AUDIO])
        bare = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        expected = thinker(**bare).logits[:, -1]
        fmd_ext.patch(thinker, fork_layers=2)
        second = SecondPass(thinker, **bare)
        thinker.generate(**prompt, **GREEDY, logits_processor=LogitsProcessorList([second]))
        torch.testing.assert_close(second.seen[0], expected, atol=1e-4, rtol=1e-4)

    def test_a_placeholder_that_was_generated_is_text_in_the_next_turn(self, thinker):
        """Its id comes back in the ids of the next `generate` on the same cache, which brings no features."""
        prompt = build_inputs([TEXT_ONLY])
        handle = fmd_ext.patch(thinker, fork_layers=2)
        for name in ("video_token", "audio_token"):
            cache = DynamicCache()
            first = thinker.generate(**prompt, **GREEDY, **cache_kwargs(cache))
            ids = torch.cat([first, torch.tensor([[TOKEN_IDS[name], 40, 41]])], dim=1)
            thinker.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, **cache_kwargs(cache))
            assert cache.layers[0].state.modalities.tolist() == [0] and not handle.last_call.plan.forked.any()


class TestPackedSequences:
    """transformers keeps sequences apart that are packed in one row, by positions that start again."""

    def test_are_refused(self):
        model = tiny_llama()
        ids, positions = torch.randint(5, 90, (1, 14)), torch.cat([torch.arange(8), torch.arange(6)])[None]
        fmd_ext.patch(model, adapter="text", fork_layers=2)
        with pytest.raises(ValueError, match="sample 0 start again at position 8: .* packed in one row"):
            model(input_ids=ids, position_ids=positions, use_cache=False)

    def test_four_rows_of_positions(self, thinker):
        positions = torch.cat([torch.arange(5), torch.arange(3)])[None, None].expand(4, 1, -1)
        fmd_ext.patch(thinker, fork_layers=2)
        with pytest.raises(ValueError, match="start again at position 5"):
            thinker(input_ids=torch.arange(30, 38)[None], position_ids=positions, use_cache=False)

    def test_positions_that_go_on_are_none(self):
        model = tiny_llama()
        ids = torch.randint(5, 90, (1, 14))
        expected = model(input_ids=ids).logits
        fmd_ext.patch(model, adapter="text", fork_layers=2)
        given = {"input_ids": ids, "position_ids": torch.arange(14)[None], "use_cache": False}
        torch.testing.assert_close(model(**given).logits, expected, atol=1e-4, rtol=1e-4)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=100, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
