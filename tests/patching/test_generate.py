"""`generate` on a patched model, as users know it: every mode against the reference or against itself one by one."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, TextStreamer

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.adapters import find_adapter
from fmd_ext.engine.reference import decoder_inputs, reference_generate
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_thinker
from omni_inputs import AUDIO_VIDEO, INTERLEAVED, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, VIDEO_ONLY, build_inputs

NEW_TOKENS = 16
# A full recompute from token ids cannot tell a generated placeholder from a prompt's: its tests generate words only.
WORDS_ONLY = {"suppress_tokens": list(TOKEN_IDS.values())}
# Before, transformers itself repeats a clip patch by patch for beams and sequences (seen in 5.17, right in 5.23).
EXPANDS_CLIPS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="this transformers expands clips wrongly by itself"
)
BATCHES = {
    "separate": [VIDEO_AUDIO],
    "interleaved": [INTERLEAVED],
    "two padded": [TWO_CLIPS, AUDIO_VIDEO],
    "three mixed": [VIDEO_AUDIO, TEXT_ONLY, VIDEO_ONLY],
    "interleaved and text": [INTERLEAVED, TEXT_ONLY],
}


def greedy(model, inputs, count=NEW_TOKENS, **settings):
    """New tokens [batch, count]; the end-of-sequence token does not end anything."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, **settings}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("fork_layers", [0, 1, 2, 4])
@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_tokens_equal_the_reference(thinker, batch, masking, fork_layers):
    inputs = build_inputs(BATCHES[batch])
    config = FMDConfig(fork_layers=fork_layers, masking=masking, alpha=0.7).resolve(FMDConfig(), 4)
    expected = reference_generate(thinker, config, NEW_TOKENS, **inputs)
    fmd_ext.patch(thinker, config)
    assert greedy(thinker, inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_cached_decoding_equals_full_recompute(thinker, masking):
    inputs = build_inputs([VIDEO_AUDIO, INTERLEAVED[:1] + VIDEO_ONLY])
    fmd_ext.patch(thinker, masking=masking, fork_layers=2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **WORDS_ONLY}
    steps = thinker.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    ids = steps.sequences[:, :-1]
    extra = torch.ones(2, 5, dtype=torch.long)
    whole = thinker(**{**inputs, "input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], extra], 1)})
    torch.testing.assert_close(torch.stack(steps.logits, 1), whole.logits[:, -6:], atol=1e-4, rtol=0)


def chunked(thinker, inputs, sizes):
    """Prefill in chunks by hand, from embeddings, with the whole prompt's labels."""
    decoder = thinker.get_decoder()
    caught = {}
    hook = decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    whole = thinker(**inputs).logits
    hook.remove()
    labels = find_adapter(thinker).labels_of(thinker, inputs["input_ids"])
    cache, outputs, start = DynamicCache(), [], 0
    for size in sizes:
        stop = start + size
        hidden = decoder(
            inputs_embeds=caught["inputs_embeds"][:, start:stop],
            position_ids=caught["position_ids"][..., start:stop],
            attention_mask=inputs["attention_mask"][:, :stop],
            past_key_values=cache,
            modality_labels=labels,
        ).last_hidden_state
        outputs.append(thinker.lm_head(hidden))
        start = stop
    return whole, torch.cat(outputs, dim=1), cache


@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("samples", [[VIDEO_AUDIO], [INTERLEAVED], [VIDEO_AUDIO, AUDIO_VIDEO, TEXT_ONLY]], ids=len)
def test_chunked_prefill_equals_one_shot(thinker, samples, masking):
    """Chunks that hold one modality only fork all the same, since the labels announce the other."""
    inputs = build_inputs(samples)
    fmd_ext.patch(thinker, masking=masking, fork_layers=2)
    length = inputs["input_ids"].shape[1]
    whole, parts, cache = chunked(thinker, inputs, [9, 1, 7, length - 17])
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(parts[keep], whole[keep], atol=1e-4, rtol=0)
    assert cache.get_seq_length() == length


def test_several_turns_on_one_cache(thinker):
    """The second turn, with its clip, on the first turn's cache equals the two turns at once."""
    fmd_ext.patch(thinker, fork_layers=2)
    first = build_inputs([VIDEO_AUDIO])
    cache = DynamicCache()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **WORDS_ONLY}
    turn = thinker.generate(**first, **options, past_key_values=cache)
    assert cache.get_seq_length() == turn.shape[1] - 1
    follow_up = torch.cat([turn, torch.arange(50, 56)[None]], dim=1)
    again = {**first, "input_ids": follow_up, "attention_mask": torch.ones_like(follow_up)}
    fresh = greedy(thinker, again, 8)
    words = {"input_ids": follow_up, "attention_mask": again["attention_mask"]}
    continued = greedy(thinker, words, 8, past_key_values=cache)
    assert continued.tolist() == fresh.tolist()


def test_a_clip_in_the_second_turn(thinker):
    """Text first, the clip later: what was cached becomes the shared prefix, as in one prompt."""
    handle = fmd_ext.patch(thinker, fork_layers=2, masking="attention")
    inputs = build_inputs([[("text", 12), *VIDEO_AUDIO]])
    whole = thinker(**inputs).logits
    cache = thinker(input_ids=inputs["input_ids"][:, :12], attention_mask=torch.ones(1, 12)).past_key_values
    assert not handle.last_call.plan.forked.any()
    positions = thinker.get_rope_index if hasattr(thinker, "get_rope_index") else thinker.model.get_rope_index
    frames = inputs["feature_attention_mask"].sum(-1)
    ids, _ = positions(
        inputs["input_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"],
        audio_seqlens=frames,
        second_per_grids=inputs["video_second_per_grid"],
    )
    rest = {**inputs, "input_ids": inputs["input_ids"][:, 12:], "position_ids": ids[..., 12:], "past_key_values": cache}
    torch.testing.assert_close(thinker(**rest).logits, whole[:, 12:], atol=1e-4, rtol=0)
    assert handle.last_call.plan.forked.all()


def test_a_clip_in_the_second_turn_of_generate(thinker):
    """Whether the second call is given all ids or the new ones only."""
    handle = fmd_ext.patch(thinker, fork_layers=2)
    inputs = build_inputs([[("text", 12), *VIDEO_AUDIO]])
    tokens = []
    for start in (0, 12):
        cache = thinker(input_ids=inputs["input_ids"][:, :12], attention_mask=torch.ones(1, 12)).past_key_values
        call = {**inputs, "input_ids": inputs["input_ids"][:, start:], "past_key_values": cache}
        tokens.append(greedy(thinker, call, 4).tolist())
        assert handle.last_call.plan.forked.all()
        assert cache.layers[0].state.fork_table.length[0, 0] == 12 + 6  # up to the clip
    assert tokens[0] == tokens[1]


def test_generated_tokens_are_text_whatever_their_id(thinker):
    """Forced to say the audio placeholder, the model goes on as after any word."""
    inputs = build_inputs([VIDEO_AUDIO])
    handle = fmd_ext.patch(thinker, fork_layers=2, masking="attention")
    audio = TOKEN_IDS["audio_token"]
    greedy(thinker, inputs, 3, prefix_allowed_tokens_fn=lambda batch, ids: [audio])
    assert handle.last_call.plan.num_away == 1  # text has a row in both branches, audio in one
    cache = thinker(**inputs).past_key_values
    thinker(input_ids=torch.tensor([[audio]]), past_key_values=cache)  # a decode loop by hand
    assert handle.last_call.plan.num_away == 1


def test_sampling_with_a_seed(thinker):
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    fmd_ext.patch(thinker, fork_layers=2)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(thinker.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=3.0, eos_token_id=None))
    assert torch.equal(*runs)
    torch.manual_seed(8)
    assert not torch.equal(runs[0], thinker.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=3.0))


def as_embeddings(thinker, inputs):
    """The same batch as embeddings with labels by hand and plain positions."""
    given = decoder_inputs(thinker, **inputs)
    mask = inputs["attention_mask"]
    return {
        "inputs_embeds": given["inputs_embeds"],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "modality_labels": given["labels"],
    }


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_beam_search_scores_equal_full_recompute(thinker, masking):
    """Every beam kept the cache of its own past: its score is that of its words, recomputed without a cache."""
    batch = as_embeddings(thinker, build_inputs([VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO]))
    fmd_ext.patch(thinker, masking=masking, fork_layers=2)
    beams = thinker.generate(
        **batch, max_new_tokens=5, num_beams=4, do_sample=False, eos_token_id=None, num_return_sequences=4,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    embed = thinker.get_input_embeddings()
    for beam in range(4):
        words = beams.sequences[beam::4]  # this beam of every sample
        whole = {
            "inputs_embeds": torch.cat([batch["inputs_embeds"], embed(words[:, :-1])], dim=1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1),
            "position_ids": torch.cat([batch["position_ids"], batch["position_ids"][:, -1:] + torch.arange(1, 5)], 1),
        }
        labels = torch.nn.functional.pad(batch["modality_labels"], (0, 4))  # words are text
        logits = thinker(**whole, modality_labels=labels).logits[:, -5:]
        scores = logits.log_softmax(-1).gather(2, words[..., None]).sum((1, 2))
        torch.testing.assert_close(scores, beams.sequences_scores[beam::4], atol=1e-3, rtol=0)


@EXPANDS_CLIPS
def test_beam_search_from_token_ids(thinker):
    """One beam's first word is the greedy one, and the fork sees each beam's clip whole."""
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    fmd_ext.patch(thinker, fork_layers=2)
    options = {"max_new_tokens": 1, "num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    beams = thinker.generate(**inputs, **options, do_sample=False, eos_token_id=None)
    best = thinker(**inputs).logits[:, -1].log_softmax(-1).max(-1)
    assert beams.sequences[:, -1].tolist() == best.indices.tolist()
    torch.testing.assert_close(beams.sequences_scores, best.values, atol=1e-4, rtol=0)


@EXPANDS_CLIPS
def test_several_sequences_per_prompt(thinker):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    fmd_ext.patch(thinker, fork_layers=2)
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 3, "eos_token_id": None}
    out = thinker.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    expected = greedy(thinker, inputs, 4)  # top_k=1 is greedy
    assert out.tolist() == expected.repeat_interleave(3, 0).tolist()


def test_streamer(thinker):
    class Tokens(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2)
    streamer = Tokens()
    tokens = greedy(thinker, inputs, 5, streamer=streamer)
    assert streamer.seen == [*inputs["input_ids"][0].tolist(), *tokens[0].tolist(), "end"]


def test_hidden_states_of_every_step(thinker):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    fmd_ext.patch(thinker, fork_layers=2)
    out = thinker.generate(
        **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, output_hidden_states=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    lengths = [inputs["input_ids"].shape[1], 1, 1]
    assert [[tuple(s.shape) for s in step] for step in out.hidden_states] == [[(2, n, 256)] * 5 for n in lengths]


def test_bfloat16():
    inputs = build_inputs([VIDEO_AUDIO, INTERLEAVED[:1] + AUDIO_VIDEO])
    half = tiny_thinker(seed=0).to(torch.bfloat16)  # its own: the shared model would keep rounded buffers
    inputs = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    fmd_ext.patch(half, fork_layers=2)
    tokens = greedy(half, inputs, 8)
    assert tokens.shape == (2, 8)
    # Left to itself the decoder continues its own words: every step is the argmax of a full recompute, up to ties
    # that bfloat16 makes.
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    logits = half(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -9:-1].float()
    chosen = logits.gather(2, tokens[..., None])[..., 0]
    assert (logits.amax(-1) - chosen).max() <= 0.02 * logits.abs().max()


def test_prompt_lookup_and_assisted_decoding(thinker):
    """Both propose several tokens at once and crop the cache back to what was accepted."""
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2)
    expected = greedy(thinker, inputs, 10)
    assert greedy(thinker, inputs, 10, prompt_lookup_num_tokens=3).tolist() == expected.tolist()
    assistant = tiny_thinker(seed=1, num_layers=1)
    text = build_inputs([TEXT_ONLY])
    assert greedy(thinker, text, 10, assistant_model=assistant).tolist() == greedy(thinker, text, 10).tolist()


def test_speech_out_of_the_full_model(omni):
    """The talker reads the thinker's hidden states; its speech changes with the fork and the text is the thinker's."""
    inputs = build_inputs([VIDEO_AUDIO])
    # transformers 5.23 hands unprefixed pixel values to the talker too, which refuses them.
    to_thinker = {name if name == "input_ids" else f"thinker_{name}": value for name, value in inputs.items()}
    lengths = {"thinker_max_new_tokens": 6, "thinker_min_new_tokens": 6, "talker_max_new_tokens": 8}

    def speak():
        torch.manual_seed(0)
        return omni.generate(**to_thinker, **lengths, talker_do_sample=False, thinker_do_sample=False)

    vanilla_text, vanilla_speech = speak()
    fmd_ext.patch(omni, fork_layers=2)
    text, speech = speak()
    alone = omni.thinker.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert text.tolist() == alone.tolist()
    assert speech.numel() > 0 and torch.isfinite(speech).all()
    assert not torch.equal(text, vanilla_text) and not torch.equal(speech[:100], vanilla_speech[:100])
    fmd_ext.unpatch(omni)
    assert torch.equal(speak()[1], vanilla_speech)
