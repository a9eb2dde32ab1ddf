"""The bundled model in one eager engine of vLLM on the CPU, held to the library's patched model."""

from __future__ import annotations

import pytest

from served import (
    ALL,
    BOTH_MODALITIES,
    FIRST_RESERVED,
    ONE_MODALITY,
    SEPARATE,
    SETTINGS,
    SOUND_FIRST,
    Ask,
    Library,
    answers,
    greedy,
    start,
    tokens,
)

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402

CHUNK = 32  # tokens per step: every prompt here is prefilled in several
BLOCK = 128  # tokens per block of the cache, on a CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_full_model(MODEL, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def engine(folder):
    return start(folder, settings=SETTINGS, max_num_batched_tokens=CHUNK)


@pytest.fixture(scope="module")
def library():
    return Library(SETTINGS)


@pytest.fixture(scope="module")
def unpatched():
    return Library(None)


@pytest.fixture(scope="module")
def alone(engine):
    """Of each ask what the engine answers to it alone."""
    return {name: answers(engine, [ask.prompt()], greedy(logprobs=5))[0] for name, ask in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens_are_the_librarys(name, alone, library):
    expected, logprobs = library.answer(ALL[name])
    answer = alone[name].outputs[0]
    assert list(answer.token_ids) == expected
    for token, found in answer.logprobs[0].items():
        assert found.logprob == pytest.approx(logprobs[token].item(), abs=1e-4)


def test_answers_do_not_depend_on_the_batch(engine, alone):
    names = [*ALL, *reversed(ALL)]
    together = tokens(answers(engine, [ALL[name].prompt() for name in names], greedy()))
    assert together == [list(alone[name].outputs[0].token_ids) for name in names]


def test_settings_change_answers_of_both_modalities_only(alone, unpatched):
    """Else the test above would hold for a server that never forks."""
    plain = {name: unpatched.answer(ask)[1] for name, ask in ALL.items()}
    for name, output in alone.items():
        differs = max(
            abs(found.logprob - plain[name][token].item()) for token, found in output.outputs[0].logprobs[0].items()
        )
        assert (differs > 1e-2) == (name in BOTH_MODALITIES), (name, differs)


@pytest.mark.parametrize("name", BOTH_MODALITIES)
def test_switched_off_by_the_request(name, engine, unpatched):
    ask = BOTH_MODALITIES[name]
    on_before, off, on_after = answers(engine, [ask.prompt(), ask.prompt(fmd=False), ask.prompt(fmd=True)], greedy())
    assert tokens([off]) == [unpatched.answer(ask)[0]]
    assert tokens([on_before]) == tokens([on_after])
    assert max(off.prompt_token_ids) < FIRST_RESERVED <= max(on_before.prompt_token_ids)


def test_one_modality_masks_nothing(alone):
    for name in ONE_MODALITY:
        assert max(alone[name].prompt_token_ids) < FIRST_RESERVED


def test_a_bad_switch_is_refused_and_the_engine_lives_on(engine, alone):
    with pytest.raises(ValueError, match="must be true or false, got 'no'"):
        answers(engine, [BOTH_MODALITIES["separate"].prompt(fmd="no")], greedy())
    again = answers(engine, [BOTH_MODALITIES["separate"].prompt()], greedy())
    assert tokens(again) == [list(alone["separate"].outputs[0].token_ids)]


def places(ids, first, last):
    where = [index for index, token in enumerate(ids) if token in (first, last)]
    return where[0], where[-1]


def test_a_prompt_may_be_cut_anywhere(engine, library):
    """Chunks of 32: which tokens a cut falls between depends on the length of the text before the clip."""
    video, audio = FIRST_RESERVED + 1, FIRST_RESERVED + 2
    cut_in = set()
    for words in range(30):
        ask = Ask("What is making sound?", SEPARATE, system="a " * words)
        output = answers(engine, [ask.prompt()], greedy())[0]
        ids = output.prompt_token_ids
        (first_seen, last_seen), (first_heard, last_heard) = places(ids, video, video), places(ids, audio, audio)
        for cut in range(CHUNK, len(ids), CHUNK):  # a chunk begins here
            if first_seen < cut <= last_seen:
                cut_in.add("video")
            elif last_seen < cut <= first_heard:
                cut_in.add("between")
            elif first_heard < cut <= last_heard:
                cut_in.add("audio")
        assert tokens([output]) == [library.answer(ask)[0]], words
    assert cut_in == {"video", "between", "audio"}


class TestPrefixCache:
    """Prompts with a text of more than a block before the clip, so that something can be shared."""

    LONG = "You are a helpful assistant. " * 30

    def ask(self, parts, words=""):
        return Ask("What is making sound?", parts, system=words + self.LONG)

    def test_a_repeated_prompt_is_found_and_answered_alike(self, engine, library):
        ask = self.ask(SEPARATE, "one ")
        first, second = (answers(engine, [ask.prompt()], greedy())[0] for _ in range(2))
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == (len(second.prompt_token_ids) - 1) // BLOCK * BLOCK > 0
        assert tokens([first]) == tokens([second]) == [library.answer(ask)[0]]

    def test_text_is_shared_and_sound_is_not(self, engine, library):
        """The same sound, with and without a video behind it: it is masked in one branch of the first alone."""
        both, sound = self.ask(SOUND_FIRST, "two "), self.ask(SOUND_FIRST[:1], "two ")
        first = answers(engine, [both.prompt()], greedy())[0]
        start_of_sound = first.prompt_token_ids.index(FIRST_RESERVED + 2)
        assert len(first.prompt_token_ids) // BLOCK > start_of_sound // BLOCK > 0, "no block holds sound"
        second = answers(engine, [sound.prompt()], greedy())[0]
        assert second.num_cached_tokens == start_of_sound // BLOCK * BLOCK
        assert tokens([first, second]) == [library.answer(ask)[0] for ask in (both, sound)]

    def test_on_and_off_share_text_only(self, engine, library, unpatched):
        ask = self.ask(SEPARATE, "three ")
        on = answers(engine, [ask.prompt()], greedy())[0]
        start_of_clip = on.prompt_token_ids.index(FIRST_RESERVED + 1)
        assert len(on.prompt_token_ids) // BLOCK > start_of_clip // BLOCK > 0, "no block holds the clip"
        off = answers(engine, [ask.prompt(fmd=False)], greedy())[0]
        assert off.num_cached_tokens == start_of_clip // BLOCK * BLOCK
        assert tokens([on, off]) == [library.answer(ask)[0], unpatched.answer(ask)[0]]
