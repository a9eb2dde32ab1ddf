"""One batch of questions answered by one method, and how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fmd_ext.lab.baselines import method_of
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.methods import Choice

GENERATION_CONFIGS = ("neutral", "model")
# What stays in force of a checkpoint's generation_config when decoding is neutral: which tokens begin, end and pad an
# answer, and which are no text.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
THINKING_TOKENS = 4096  # for a model that thinks aloud before it answers
# Entries that say nothing about how an answer is chosen.
_NO_CHOICE = ("transformers_version", "use_cache", "cache_implementation", "max_length", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are generated; the same for every method of a run.

    Args:
        temperature: 0 is greedy decoding; above 0 samples.
        top_p: of the likeliest tokens, under sampling.
        samples: answers per question under sampling, each with random numbers of its own.
        seed: of the random numbers. They depend on the seed, the sample and the questions of the batch, and are the
            same for all methods.
        max_new_tokens: None leaves it to the benchmark and the kind of question.
        generation_config: ``"neutral"``: a checkpoint's repetition penalty and the like have no effect; ``"model"``:
            they have. Temperature, top-p and top-k are always those of this object.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    max_new_tokens: int | None = None
    generation_config: str = "neutral"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}")
        if self.samples < 1 or (self.samples > 1 and not self.temperature):
            raise ValueError(f"samples must be 1, or more with a temperature above 0, got {self.samples}")
        if self.generation_config not in GENERATION_CONFIGS:
            raise ValueError(
                f"generation_config must be {' or '.join(GENERATION_CONFIGS)}, got {self.generation_config!r}"
            )

    def arguments(self) -> dict[str, Any]:
        if not self.temperature:
            # Neutral values for what a model's generation_config may set for sampling.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclasses.dataclass(frozen=True)
class Said:
    """Answers to a batch, in its order. Times in seconds, of the whole batch.

    ``ended``: by an end token, not by the limit of tokens. ``non_finite_steps``: steps in which the scores could not be
    ranked. ``notes``: what the method says of each prompt, kind to detail.
    """

    texts: list[str]
    tokens: list[int]
    ended: list[bool]
    non_finite_steps: list[int]
    first_token_s: float
    seconds: float
    notes: list[dict[str, str]] = dataclasses.field(default_factory=list)


def checkpoint_settings(model: Any) -> dict[str, Any]:
    """What the checkpoint's generation_config sets about the choice of tokens, apart from special tokens."""
    own = model.generation_config.to_diff_dict()
    return {
        name: value
        for name, value in own.items()
        if name not in (*_TOKENS, *_NO_CHOICE) and not name.startswith(("_", "output_", "return_"))
    }


def settings_in_force(model: Any, decoding: Decoding) -> dict[str, Any]:
    """All that ``generate`` is told about the choice of tokens, special tokens included, as JSON holds it."""
    with _configured(model, decoding):
        told = {**model.generation_config.to_diff_dict(), **decoding.arguments()}
    return {
        name: value
        for name, value in told.items()
        if name not in _NO_CHOICE and not name.startswith(("_", "output_", "return_")) and value is not None
    }


@contextlib.contextmanager
def _configured(model: Any, decoding: Decoding) -> Iterator[None]:
    """``generate`` fills what a call leaves open from the model's generation_config; within this context, by ours."""
    own = model.generation_config
    if decoding.generation_config == "neutral":
        kept = {name: value for name in _TOKENS if (value := getattr(own, name, None)) is not None}
        model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = own


def answer(
    model: Any,
    processor: Any,
    choice: Choice,
    inputs: dict[str, Any],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    exactly: bool = False,
    random_key: Sequence[Any] = (),
) -> Said:
    """Answers the prompts of ``inputs`` by a method.

    Args:
        model: a transformers model, unpatched.
        processor: with the tokenizer.
        choice: the method and its settings.
        inputs: of ``prepare_batch``, on the model's device; padded on the left.
        max_new_tokens: at most so many.
        exactly: go on after the end of the answer, for timings of equal length.
        random_key: what the random numbers depend on besides the seed.
    """
    width = inputs["input_ids"].shape[1]
    clock, check = _Clock(), _RankingCheck()
    least = {"min_new_tokens": max_new_tokens} if exactly else {}
    randomly = bool(decoding.temperature)
    with (
        _configured(model, decoding),
        choice.applied(model, processor),
        torch.random.fork_rng(_devices(model), enabled=randomly),
    ):
        if randomly:
            torch.manual_seed(_seed(decoding.seed, *random_key))
        start = _now(model)
        ids = model.generate(
            **inputs,
            **decoding.arguments(),
            **least,
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            logits_processor=LogitsProcessorList([check]),
        )
        end = _now(model)
        method = method_of(model)
    new = ids[:, width:]
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    tokens, ended = _lengths(model, new)
    notes = (method.notes if method else []) or [{} for _ in texts]
    return Said(texts, tokens, ended, check.steps(tokens), (clock.first or end) - start, end - start, notes)


def token_limits(processor: Any, limits: Mapping[str, int]) -> dict[str, int]:
    """Tokens by kind of question. A model whose chat template knows ``<think>`` gets those for thinking besides."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None) or ""
    more = THINKING_TOKENS if "<think>" in str(template) else 0
    return {kind: limit + more for kind, limit in limits.items()}


def max_new_tokens_for(items: Sequence[Item], limits: dict[str, int], decoding: Decoding) -> int:
    """Of a batch: the most that one of its kinds of question may need."""
    return decoding.max_new_tokens or max(limits[item.kind] for item in items)


class _Clock(StoppingCriteria):
    """Stops nothing; notes when the first token is there."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.first = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _RankingCheck(LogitsProcessor):
    """Changes nothing; notes the steps in which no token is the likeliest: a NaN, +inf, or -inf for all."""

    def __init__(self) -> None:
        self._unranked: list[torch.Tensor] = []  # per step bool [rows]; read at the end, so that no step waits for it

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._unranked.append(~torch.isfinite(scores.amax(-1)))
        return scores

    def steps(self, tokens: Sequence[int]) -> list[int]:
        """Per row, of its first ``tokens`` steps; what comes after the end of an answer does not count."""
        if not self._unranked:
            return [0] * len(tokens)
        unranked = torch.stack(self._unranked).cpu()
        return [int(unranked[:count, row].sum()) for row, count in enumerate(tokens)]


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _devices(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _lengths(model: Any, new: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Tokens of each answer up to and including the end of the turn, and whether it has ended."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=new.device)
    at_end = torch.isin(new, ends)
    ended = at_end.any(1)
    return torch.where(ended, at_end.int().argmax(1) + 1, new.shape[1]).tolist(), ended.tolist()


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
