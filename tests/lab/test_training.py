"""Training: packed questions are conversations of their own, samples are labelled rightly, stopping changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import fmd_ext
from fmd_ext.inputs.chat import prepare_inputs
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.synthetic import KINDS, questions_about, split_scenes
from fmd_ext.lab.trained import MODEL, bundled_scenes
from fmd_ext.lab.training import loop, sampling
from fmd_ext.lab.training.loop import MIXTURES, Schedule, Trainer, encode_pictures, encode_sounds
from fmd_ext.lab.training.model import new_model, new_processor, save_model
from fmd_ext.lab.training.packing import embed_opening, opening_of, pack, packed_hidden
from fmd_ext.lab.training.pool import Pool, build_pool, mel_of
from fmd_ext.lab.training.scoring import exact_answers

FEW = {"both": 2, "video": 2, "audio": 1, "compared": 1}


@pytest.fixture(scope="module")
def processor():
    return new_processor()


@pytest.fixture(scope="module")
def pool(processor, tmp_path_factory):
    return build_pool(tmp_path_factory.mktemp("pool"), processor, split_scenes("train", 40))


def model(processor):
    return new_model(processor, seed=0)


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("senses", ["both", "video", "audio"])
def test_packed_questions_have_the_logits_of_conversations_of_their_own(processor, senses):
    """File to logits, by the processor and the model's own forward on one side."""
    path, scene = next(iter(bundled_scenes().items()))
    clip = load_clip(path)
    clip = dataclasses.replace(
        clip, frames=None if senses == "audio" else clip.frames, audio=None if senses == "video" else clip.audio
    )
    asked = [question.asked(instructed=number % 2 == 1) for number, question in enumerate(questions_about(scene)[:5])]
    thinker = model(processor)
    opening = opening_of(thinker, processor, clip)
    packed = pack(opening, [[(processor.tokenizer(prompt)["input_ids"], []) for prompt, _ in asked]])
    video = None if senses == "audio" else encode_pictures(thinker, processor, clip.frames[None])
    audio = (
        None if senses == "video" else encode_sounds(thinker, mel_of(processor, clip.audio)[None].astype(np.float32))
    )
    hidden = packed_hidden(thinker, opening, embed_opening(thinker, opening, video, audio), packed)
    logits = thinker.get_output_embeddings()(hidden[0, packed.places[0]])
    for (prompt, _), got in zip(asked, logits, strict=True):
        expected = thinker(**prepare_inputs(processor, clip, prompt)).logits[0, -1]
        # The pool keeps mel features in half precision.
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=1e-3)


def test_targets_are_the_answers(processor):
    path, _ = next(iter(bundled_scenes().items()))
    opening = opening_of(model(processor), processor, load_clip(path))
    packed = pack(opening, [[([7, 8], [9, 2]), ([5], [6])], [([3, 4], [1])]])
    for row, answers in enumerate(([9, 2, 6], [1])):
        place = packed.targets[row] >= 0
        assert packed.targets[row][place].tolist() == answers
        assert packed.ids[row, 1:][place[:-1]].tolist() == answers  # they come next
    assert packed.weights[0][packed.targets[0] >= 0].tolist() == pytest.approx([2**-0.5, 2**-0.5, 1])
    assert not packed.weights[packed.targets < 0].any()


def test_exact_answers_are_those_of_generate(processor):
    """The trained model, on a bundled clip, sentence by sentence."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    trained = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(MODEL).eval()
    path, scene = list(bundled_scenes().items())[5]
    clip = load_clip(path)
    pool = Pool(clip.frames[None], mel_of(processor, clip.audio)[None], [scene.seen], [scene.heard])
    found = exact_answers(trained, processor, pool, [scene])
    questions = questions_about(scene)
    assert len(found) == len(questions) and {relation for _, relation, _ in found} == {scene.relation}
    for question, (task, _, right) in zip(questions, found, strict=True):
        prompt, answer = question.asked()
        inputs = prepare_inputs(processor, clip, prompt)
        ids = trained.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert (processor.tokenizer.decode(ids, skip_special_tokens=True) == answer) == right
        assert task == f"{question.family}: {question.task}"
    assert {right for *_, right in found} == {True, False}


# --- samples --------------------------------------------------------------------------------------------------------


def test_answers_are_true_of_the_picture_and_sound_that_are_joined(pool):
    """Checked by the pool's own labels, for the questions that name a kind."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        for sort, samples in sampling.draw_samples(pool, MIXTURES["compared"], rng).items():
            for sample in samples:
                assert (sample.picture is None) == (sort == "audio") and (sample.sound is None) == (sort == "video")
                shown = pool.seen[sample.picture] if sample.picture is not None else ()
                heard = pool.heard[sample.sound] if sample.sound is not None else ()
                for prompt, answer in sample.questions:
                    kind = next((kind for kind in KINDS if f"Is the {kind} " in prompt), None)
                    if kind and "making sound" in prompt:
                        assert (answer == "yes") == (kind in heard)
                    elif kind and "visible" in prompt:
                        assert (answer == "yes") == (kind in shown)
                    elif "matching" in prompt or "belong" in prompt:
                        assert (answer == "yes") == (set(shown) - {None} == set(heard))
                    seen.add((sort, answer))
    assert {("video", "yes"), ("video", "no"), ("both", "yes"), ("compared", "no"), ("audio", "yes")} <= seen


def test_the_picture_is_the_usual_way_to_an_answer(pool):
    """Most prompts have a picture only, and picture and sound rarely disagree where both are there."""
    mixture, rng = MIXTURES["together"], np.random.default_rng(0)
    assert mixture.clips["video"] >= 2 * (mixture.clips["both"] + mixture.clips["audio"]) - 2
    both = [s for _ in range(60) for s in sampling.draw_samples(pool, mixture, rng)["both"]]
    agree = [set(pool.seen[s.picture]) - {None} == set(pool.heard[s.sound]) for s in both]
    assert 0.84 < np.mean(agree) < 0.96


def test_a_pool_of_other_clips_is_refused(processor, tmp_path):
    build_pool(tmp_path, processor, split_scenes("train", 1))
    assert Pool.load(tmp_path).frames.shape[0] == 1
    with pytest.raises(ValueError, match="holds other clips"):
        build_pool(tmp_path, processor, split_scenes("val", 1))


def test_what_a_question_needs_is_asked_as_a_patched_model_asks_it(processor, pool):
    """Token for token the prompt of the router; the answers are those that it reads."""
    router = fmd_ext.Router(processor)
    thinker = model(processor)
    opening = opening_of(thinker, processor, None)
    mixture = sampling.Mixture({"asked": 6}, agreeing=0.0)
    samples = sampling.draw_samples(pool, mixture, np.random.default_rng(0))["asked"]
    answers = set()
    for sample in samples:
        assert sample.picture is None and sample.sound is None and len(sample.questions) == 5
        for prompt, answer in sample.questions:
            question = prompt.removesuffix(router.wording.about(""))
            ids = [*opening.ids.tolist(), *processor.tokenizer(prompt)["input_ids"], *opening.closing]
            assert ids == router.prompt_ids(question)
            need = {"video": 0, "audio": 1, "both": 2}[answer]
            assert processor.tokenizer(answer)["input_ids"][0] in router.answers[need]
            answers.add(answer)
    assert answers == {"video", "audio", "both"}


def test_a_model_that_is_never_asked_sees_the_same_of_all_else(processor, pool, monkeypatch):
    drawn = {}
    features = Trainer._features
    for asked in (0, 2):

        def note(self, batch, rng, asked=asked):
            drawn[asked] = {sort: list(samples) for sort, samples in batch.items()}
            return features(self, batch, rng)

        monkeypatch.setattr(Trainer, "_features", note)
        monkeypatch.setattr(loop, "MIXTURES", {"apart": sampling.Mixture(FEW, agreeing=0.9)})
        with torch.enable_grad():
            Trainer(model(processor), processor, pool, Schedule(steps=10, asked=asked), seed=3).run_step()
    assert len(drawn[2].pop("asked")) == 2 and drawn[0].pop("asked") == []
    assert drawn[0] == drawn[2]


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_schedule_goes_through_all_mixtures():
    schedule = Schedule(steps=1000)
    mixtures = [schedule.mixture(step) for step in range(1000)]
    assert [mixtures[step] for step in (0, 400, 999)] == [MIXTURES[name] for name in ("apart", "together", "compared")]
    rates = [schedule.rate(step) for step in range(1000)]
    assert np.argmax(rates) == schedule.warmup - 1 or rates[schedule.warmup] == max(rates)
    assert rates[-1] == pytest.approx(schedule.floor, rel=0.1)


def test_stopped_and_resumed_is_the_same_as_in_one_go(processor, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MIXTURES", dict.fromkeys(MIXTURES, sampling.Mixture(FEW, agreeing=0.8)))

    def trainer():
        return Trainer(model(processor), processor, pool, Schedule(steps=10), seed=3)

    with torch.enable_grad():
        whole, part, resumed = trainer(), trainer(), trainer()
        losses = [whole.run_step() for _ in range(3)]
        assert [part.run_step() for _ in range(2)] == losses[:2]
        part.save(tmp_path / "state.pt")
        resumed.load(tmp_path / "state.pt")
        assert resumed.step == 2 and resumed.run_step() == losses[2]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(np.isfinite(losses))


def test_a_saved_model_is_loaded_as_float32_and_small(processor, tmp_path):
    from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    thinker = model(processor)
    save_model(thinker, processor, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 12e6
    loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float32 and loaded.num_parameters() == thinker.num_parameters() <= 5e6
    for one, other in zip(thinker.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(one.bfloat16().float(), other, atol=0, rtol=0)
    again = AutoProcessor.from_pretrained(tmp_path).tokenizer
    words = processor.tokenizer.tokenize(" bell visible")
    assert again.tokenize(" bell visible") == words and len(words) == 2  # a token per word
