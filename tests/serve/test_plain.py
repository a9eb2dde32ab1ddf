"""Engines side by side: plain vLLM, ours with ``fork_layers=0``, and ours, each with whole prompts in one step."""

from __future__ import annotations

import pytest

from served import (
    ALL,
    BOTH_MODALITIES,
    FIRST_RESERVED,
    ONE_MODALITY,
    SETTINGS,
    answers,
    greedy,
    start,
    tokens,
)

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_full_model(MODEL, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def engines(folder):
    return {
        "plain": start(folder, plain=True),
        "fork_layers=0": start(folder, settings={"fork_layers": 0}),
        "ours": start(folder, settings=SETTINGS),
    }


@pytest.fixture(scope="module")
def engine(engines):
    return engines["ours"]


def told(engine, asks, **options):
    return tokens(answers(engine, [ask.prompt(**options) for ask in asks], greedy(16)))


def separate(asks):
    """Without those for whose interleaved clips vLLM itself has other positions than the model was trained with."""
    return [ask for ask in asks.values() if not ask.interleaved]


def test_no_fork_layers_is_plain_vllm(engines):
    asks = separate(ALL)
    assert told(engines["fork_layers=0"], asks) == told(engines["plain"], asks)


def test_what_masks_nothing_is_answered_as_by_plain_vllm(engines):
    asks = list(ONE_MODALITY.values())
    assert told(engines["ours"], asks) == told(engines["plain"], asks)
    both = separate(BOTH_MODALITIES)
    assert told(engines["ours"], both, fmd=False) == told(engines["plain"], both)
    assert told(engines["ours"], both) != told(engines["plain"], both)


def test_one_group_of_caches_with_fork_layers_more(engines):
    """Keys and values grow by fork_layers / layers: one group, one block table."""
    layers = {}
    for name, engine in engines.items():
        core = engine.llm_engine.engine_core.engine_core
        (group,) = core.model_executor.driver_worker.worker.model_runner.kv_cache_config.kv_cache_groups
        layers[name] = len(group.layer_names)
    assert layers == {"plain": 6, "fork_layers=0": 6, "ours": 6 + SETTINGS["fork_layers"]}


class TestSampling:
    ASK = BOTH_MODALITIES["separate"]

    def sampling(self, **options):
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 1.5, "max_tokens": 24, "ignore_eos": True, **options})

    def test_a_seed_gives_the_same_answer_again(self, engine):
        first, second = (answers(engine, [self.ASK.prompt()], self.sampling(seed=7))[0] for _ in range(2))
        other = answers(engine, [self.ASK.prompt()], self.sampling(seed=8))[0]
        assert tokens([first]) == tokens([second]) != tokens([other])

    def test_several_answers_of_one_prompt(self, engine):
        output = answers(engine, [self.ASK.prompt()], self.sampling(n=3, seed=1))[0]
        found = {tuple(answer.token_ids) for answer in output.outputs}
        assert len(output.outputs) == 3 and len(found) > 1  # drawn apart, and two may be alike

    def test_reserved_ids_are_never_sampled(self, engine):
        likely = {FIRST_RESERVED + index: 100.0 for index in range(3)}
        output = answers(engine, [self.ASK.prompt()], self.sampling(logit_bias=likely, n=2, seed=0))[0]
        sampled = [token for answer in output.outputs for token in answer.token_ids]
        assert len(sampled) == 48 and max(sampled) < FIRST_RESERVED

    def test_log_probabilities_of_the_prompt(self, engine):
        output = answers(engine, [self.ASK.prompt()], greedy(1, prompt_logprobs=1))[0]
        told = output.prompt_logprobs
        assert len(told) == len(output.prompt_token_ids)
        text = [index for index, token in enumerate(output.prompt_token_ids) if token < FIRST_RESERVED][1:]
        assert all(told[index][output.prompt_token_ids[index]].logprob > -100 for index in text)
