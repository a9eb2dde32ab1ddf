"""What transformers' own tests claim of every model that generates, claimed of patched ones.

transformers' source distribution holds neither its model tests nor its generation tests: the claims are written anew.
Each holds the patched model to itself by another route, for three families and both maskings. That the numbers of
one of the routes are those of the method is the matter of the reference tests.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

import fmd_ext
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_thinker
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from omni_inputs import QWEN2_5, QWEN3, TEXT_ONLY, VIDEO_AUDIO, build_inputs

TOLERANCE = {"atol": 1e-4, "rtol": 0}
NEW_TOKENS = 5
Inputs = dict[str, Any]


def text_decoder():
    config = Qwen2Config(
        vocab_size=300, hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def text_inputs(samples: list[list[tuple]]) -> Inputs:
    """Words everywhere; which of them count as picture and sound the labels say."""
    labels_of = {"text": 0, "video": 1, "audio": 2}
    rows = [[labels_of[kind] for kind, *_ in sample for _ in range(4)] for sample in samples]
    width = max(map(len, rows))
    labels = torch.tensor([[-1] * (width - len(row)) + row for row in rows])
    ids = torch.stack([_words(row, width) for row in rows])
    return {"input_ids": ids, "attention_mask": (labels >= 0).long(), "modality_labels": labels}


def _words(row: list[int], width: int) -> torch.Tensor:
    """Padding, then words that depend on the sample alone."""
    draw = torch.Generator().manual_seed(sum(place * label for place, label in enumerate(row)))
    words = torch.randint(20, 300, (len(row),), generator=draw)
    return torch.nn.functional.pad(words, (width - len(row), 0))


@dataclasses.dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    inputs: Callable[[list[list[tuple]]], Inputs]
    # A full recompute cannot tell a generated placeholder from one of the prompt: words only are generated.
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


PLACEHOLDERS = {"suppress_tokens": list(TOKEN_IDS.values())}
FAMILIES = {
    "qwen2.5 omni": Family(tiny_thinker, lambda samples: build_inputs(samples, family=QWEN2_5), PLACEHOLDERS),
    "qwen3 omni": Family(tiny_qwen3_thinker, lambda samples: build_inputs(samples, family=QWEN3), PLACEHOLDERS),
    "text decoder": Family(text_decoder, text_inputs),
}
# Sounds of one length: transformers' encoder of Qwen3-Omni lets the padding of a shorter one into its last frames.
SOUND_FIRST = [("text", 3), ("audio", 30), ("text", 2), ("video", (1, 4, 8)), ("text", 4)]
BATCH = [VIDEO_AUDIO, TEXT_ONLY, SOUND_FIRST]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A patched model and how it is called."""

    family: Family
    model: Any
    settings: dict[str, Any]

    @property
    def handle(self) -> fmd_ext.Handle:
        return fmd_ext.handle_of(self.model)

    def generate(self, inputs: Inputs, count: int = NEW_TOKENS, **options: Any) -> Any:
        lengths = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
        return self.model.generate(**inputs, **lengths, **self.family.generation, **options)

    def patched(self, model: Any) -> Subject:
        fmd_ext.patch(model, **self.settings)
        return dataclasses.replace(self, model=model)


def grown(inputs: Inputs, ids: torch.Tensor) -> Inputs:
    """The same call with words behind its prompt: ``ids`` [batch, length] are the prompt and the words."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": mask}
    if "modality_labels" in inputs:
        longer["modality_labels"] = torch.nn.functional.pad(inputs["modality_labels"], (0, more))
    return longer


def words_of(inputs: Inputs) -> Inputs:
    """A call without its features, for a cache that holds them."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "modality_labels") if name in inputs}


def alone(inputs: Inputs, row: int) -> Inputs:
    """One sample of BATCH, of which the first and the last have one video and one sound each, without its padding."""
    keep = inputs["attention_mask"][row].bool()
    sample = {name: value[row : row + 1, keep] for name, value in words_of(inputs).items()}
    if "video_grid_thw" not in inputs or BATCH[row] is TEXT_ONLY:
        return sample
    clip = slice(row > 0, (row > 0) + 1)
    patches = inputs["pixel_values_videos"].split(inputs["video_grid_thw"].prod(-1).tolist())
    by_clip = ("video_grid_thw", "video_second_per_grid", "input_features", "feature_attention_mask")
    return {**sample, "pixel_values_videos": patches[clip.start], **{name: inputs[name][clip] for name in by_clip}}


def unpatched(model: Any) -> Any:
    """A copy of a patched model as it was before."""
    twin = copy.deepcopy(model)
    fmd_ext.unpatch(twin)
    return twin


@pytest.fixture(scope="module", params=FAMILIES)
def family_and_model(request):
    family = FAMILIES[request.param]
    return family, family.make()


@pytest.fixture(params=["zero", "attention"])
def subject(request, family_and_model):
    family, model = family_and_model
    settings = {"fork_layers": 2, "masking": request.param}
    if family.make is text_decoder:
        settings["adapter"] = "text"
    fmd_ext.patch(model, **settings)
    yield Subject(family, model, settings)
    fmd_ext.unpatch(model)


class TestAsTransformersDoes:
    def test_the_calls_are_forked(self, subject):
        """Guards the others: none of them would say anything of a model that is not forked."""
        inputs = subject.family.inputs(BATCH)
        logits = subject.model(**inputs).logits
        assert subject.handle.last_call.plan.forked.tolist() == [True, False, True]
        plain = {name: value for name, value in inputs.items() if name != "modality_labels"}
        assert (logits - unpatched(subject.model)(**plain).logits)[0, -1].abs().max() > 0.05

    def test_generate_equals_forward(self, subject):
        """Every step's logits are those of one forward call on prompt and answer."""
        inputs = subject.family.inputs(BATCH)
        out = subject.generate(inputs, output_logits=True, output_scores=True, return_dict_in_generate=True)
        whole = subject.model(**grown(inputs, out.sequences[:, :-1])).logits[:, -NEW_TOKENS:]
        assert_close(torch.stack(out.logits, 1), whole, **TOLERANCE)
        assert torch.equal(torch.stack(out.scores, 1).argmax(-1), out.sequences[:, -NEW_TOKENS:])

    def test_cache_equals_no_cache(self, subject):
        inputs = subject.family.inputs(BATCH)
        options = {"output_logits": True, "return_dict_in_generate": True}
        cached, fresh = (subject.generate(inputs, use_cache=use, **options) for use in (True, False))
        assert cached.past_key_values is not None and fresh.past_key_values is None
        assert torch.equal(cached.sequences, fresh.sequences)
        assert_close(torch.stack(cached.logits), torch.stack(fresh.logits), **TOLERANCE)

    def test_left_padding_changes_nothing(self, subject):
        """In forward and in generate; the padding's id does not matter either."""
        inputs = subject.family.inputs([VIDEO_AUDIO])
        pad = torch.nn.functional.pad
        padded = {
            **inputs,
            "input_ids": pad(inputs["input_ids"], (7, 0), value=25),
            "attention_mask": pad(inputs["attention_mask"], (7, 0)),
        }
        if "modality_labels" in inputs:
            padded["modality_labels"] = pad(inputs["modality_labels"], (7, 0), value=-1)
        positions = {}
        if (
            subject.family.make is text_decoder
        ):  # as in transformers, its forward counts positions from the first row on
            positions = {"position_ids": (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
        alone, with_padding = subject.model(**inputs).logits, subject.model(**padded, **positions).logits
        assert_close(with_padding[:, 7:], alone, **TOLERANCE)
        answers = [subject.generate(call)[:, -NEW_TOKENS:] for call in (inputs, padded)]
        assert torch.equal(*answers)

    def test_batched_equals_one_by_one(self, subject):
        inputs = subject.family.inputs(BATCH)
        batched = subject.generate(inputs)[:, -NEW_TOKENS:]
        for row in range(len(BATCH)):
            assert torch.equal(subject.generate(alone(inputs, row))[:, -NEW_TOKENS:], batched[row : row + 1]), row

    @pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="this transformers expands clips wrongly by itself"
    )
    def test_beams_keep_their_own_past(self, subject):
        """With a cache, reordered step by step, as without one."""
        inputs = subject.family.inputs([VIDEO_AUDIO, SOUND_FIRST])
        options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
        cached, fresh = (subject.generate(inputs, 4, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached.sequences, fresh.sequences)
        assert_close(cached.sequences_scores, fresh.sequences_scores, atol=1e-3, rtol=0)
        assert not torch.equal(cached.sequences[0], cached.sequences[1])

    def test_dict_outputs(self, subject):
        """`generate` with and without its dictionary; shapes of what it holds are those of the caller's sequence."""
        inputs = subject.family.inputs(BATCH)
        out = subject.generate(inputs, output_logits=True, output_hidden_states=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences, subject.generate(inputs))
        length, config = inputs["input_ids"].shape[1], subject.model.config.get_text_config()
        lengths = [length, *[1] * (NEW_TOKENS - 1)]
        states = [[tuple(state.shape) for state in step] for step in out.hidden_states]
        assert states == [[(3, n, config.hidden_size)] * (config.num_hidden_layers + 1) for n in lengths]
        assert [tuple(step.shape) for step in out.logits] == [(3, config.vocab_size)] * NEW_TOKENS
        assert out.past_key_values.get_seq_length() == length + NEW_TOKENS - 1

    def test_tuples_equal_dictionaries(self, subject):
        inputs = subject.family.inputs(BATCH)
        told = subject.model(**inputs, output_hidden_states=True)
        row = subject.model(**inputs, output_hidden_states=True, return_dict=False)
        assert isinstance(row, tuple) and torch.equal(row[0], told.logits)
        states = next(part for part in row if isinstance(part, tuple) and len(part) == len(told.hidden_states))
        assert all(torch.equal(a, b) for a, b in zip(states, told.hidden_states, strict=True))

    def test_going_on_from_a_cache(self, subject):
        """An answer in two calls of `generate`, the second on the first's cache, equals the answer in one."""
        inputs = subject.family.inputs(BATCH)
        expected = subject.generate(inputs, 6)
        cache = DynamicCache(config=subject.model.config.get_text_config())
        begun = subject.generate(inputs, 3, past_key_values=cache)
        gone_on = subject.generate(words_of(grown(inputs, begun)), 3, past_key_values=cache)
        assert torch.equal(gone_on, expected)

    def test_save_and_load(self, subject, tmp_path):
        """It saves what the unpatched model does; loaded, it is unpatched, and patched again it answers the same."""
        inputs = subject.family.inputs(BATCH)
        logits = subject.model(**inputs).logits
        subject.model.save_pretrained(tmp_path)
        loaded = type(subject.model).from_pretrained(tmp_path).eval()
        assert fmd_ext.handle_of(loaded) is None
        assert set(loaded.state_dict()) == set(subject.model.state_dict())
        assert torch.equal(subject.patched(loaded).model(**inputs).logits, logits)

    def test_resized_embeddings(self, subject):
        """Resized after the patch as before it: old words score as they did, and a new word can be read."""
        inputs = subject.family.inputs(BATCH)
        logits = subject.model(**inputs).logits
        old, size = logits.shape[-1], logits.shape[-1] + 9
        after = subject.patched(unpatched(subject.model))
        after.model.resize_token_embeddings(size, mean_resizing=False)
        assert after.handle.is_in_force
        assert_close(after.model(**inputs).logits[..., :old], logits, **TOLERANCE)
        before = subject.patched(unpatched(after.model))
        longer = grown(inputs, torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=old + 4))  # a new word
        read = after.model(**longer).logits
        assert read.shape[-1] == size
        assert torch.equal(before.model(**longer).logits, read)
