"""One batch of questions answered by one method, and how long it took."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.methods import Choice


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
    """

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}")
        if self.samples < 1 or (self.samples > 1 and not self.temperature):
            raise ValueError(f"samples must be 1, or more with a temperature above 0, got {self.samples}")

    def arguments(self) -> dict[str, Any]:
        if not self.temperature:
            # Neutral values for what a model's generation_config may set for sampling.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclasses.dataclass(frozen=True)
class Said:
    """Answers to a batch, in its order. Times in seconds, of the whole batch."""

    texts: list[str]
    tokens: list[int]
    first_token_s: float
    seconds: float


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
    clock = _Clock()
    least = {"min_new_tokens": max_new_tokens} if exactly else {}
    with choice.applied(model), torch.random.fork_rng(_devices(model), enabled=bool(decoding.temperature)):
        if decoding.temperature:
            torch.manual_seed(_seed(decoding.seed, *random_key))
        start = _now(model)
        ids = model.generate(
            **inputs,
            **decoding.arguments(),
            **least,
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        end = _now(model)
    new = ids[:, width:]
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return Said(texts, _lengths(model, new), (clock.first or end) - start, end - start)


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


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _devices(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _lengths(model: Any, new: torch.Tensor) -> list[int]:
    """Tokens of each answer up to and including the end of the turn."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=new.device)
    ended = torch.isin(new, ends)
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
    return first.tolist()


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
