"""One answer of one model: the text, and how long it took."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer, TextStreamer

import fmd_ext
from fmd_ext.cli.errors import UserError, blaming_input
from fmd_ext.cli.models import LoadedModel
from fmd_ext.config import FMDConfig


@dataclasses.dataclass(frozen=True)
class Answer:
    """Text and timing.

    Attributes:
        text: without blanks before it.
        is_whole: the model ended it; otherwise it was cut off.
        first_token_s: from the call to the first token.
        tokens_per_s: of those after the first.
    """

    text: str
    num_tokens: int
    is_whole: bool
    first_token_s: float
    tokens_per_s: float | None  # None for a single token


def generate(
    loaded: LoadedModel,
    inputs: dict[str, Any],
    max_new_tokens: int,
    *,
    stream_to: TextIO | None = None,
    exactly: bool = False,
) -> Answer:
    """Greedy decoding of one prompt. ``exactly``: go on after the end of the answer, for timings of equal length.

    Raises UserError where the model's logits are not finite, which would make an answer of nothing.
    """
    clock = _Clock(loaded.processor.tokenizer, stream_to)
    least = {"min_new_tokens": max_new_tokens} if exactly else {}
    finite = FiniteLogits(loaded.model.dtype)
    start = time.perf_counter()
    ids = loaded.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        streamer=clock,
        logits_processor=LogitsProcessorList([finite]),
        **least,
    )
    finite.check()
    new = ids[0, ids.shape[1] - len(clock.times) :]  # a model that generates from embeddings returns no prompt
    after_first = clock.times[-1] - clock.times[0]
    ends = loaded.model.generation_config.eos_token_id
    return Answer(
        text=loaded.processor.tokenizer.decode(new, skip_special_tokens=True).lstrip(),
        num_tokens=len(new),
        is_whole=len(new) < max_new_tokens or int(new[-1]) in (ends if isinstance(ends, list) else [ends]),
        first_token_s=clock.times[0] - start,
        tokens_per_s=(len(clock.times) - 1) / after_first if after_first > 0 else None,
    )


def are_finite(logits: torch.Tensor) -> torch.Tensor:
    """bool []; minus infinity is no fault: it forbids a token."""
    return ~(logits.isnan() | logits.isposinf()).any()


def not_finite(dtype: torch.dtype) -> UserError:
    """What to say of a model whose logits are not."""
    remedy = "its numbers go beyond what float16 holds: try --dtype bfloat16"
    if dtype != torch.float16:
        remedy = "its weights, or what its encoders make of the clip, are broken"
    return UserError(f"the model's logits in {str(dtype).removeprefix('torch.')} are not finite; {remedy}")


class FiniteLogits(LogitsProcessor):
    """Changes nothing; raises `not_finite` at the first token, and for later ones in `check`.

    Looking at each would make the host wait for a GPU at every step.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._all_finite: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finite = are_finite(scores)
        if self._all_finite is None:
            self._all_finite = finite
            self.check()
        self._all_finite = self._all_finite & finite
        return scores

    def check(self) -> None:
        if self._all_finite is not None and not self._all_finite:
            raise not_finite(self._dtype)


@contextlib.contextmanager
def patched(loaded: LoadedModel, config: FMDConfig) -> Iterator[fmd_ext.Handle]:
    """Fork-merge decoding within this context; gives the handle. The model's own fill what is not given."""
    fields = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) is None]
    with blaming_input(ValueError, TypeError):
        filled = config.replace(**{name: getattr(loaded.settings, name) for name in fields})
        handle = fmd_ext.patch(loaded.model, filled, processor=loaded.processor)
    try:
        yield handle
    finally:
        fmd_ext.unpatch(loaded.model)


def config_from(args: argparse.Namespace) -> FMDConfig:
    """The settings given on the command line, which win over those of ``--config``. Raises UserError for wrong ones."""
    names = [field.name for field in dataclasses.fields(FMDConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with blaming_input(ValueError, TypeError, OSError):
        config = FMDConfig() if args.config is None else FMDConfig.from_file(args.config)
        return config.replace(**given)


def check_context(loaded: LoadedModel, inputs: dict[str, Any], max_new_tokens: int) -> None:
    """Raises UserError when prompt and answer do not fit into the model's context."""
    prompt, limit = inputs["input_ids"].shape[1], loaded.context_limit
    if limit is not None and prompt + max_new_tokens > limit:
        raise UserError(
            f"clip and question take {prompt} tokens and the answer up to {max_new_tokens} more, the model's limit is "
            f"{limit}: lower --max-frames, --fps, --max-frame-pixels or --max-new-tokens"
        )


class _Clock(BaseStreamer):
    """Notes when each token comes, and passes it on to be printed."""

    def __init__(self, tokenizer: Any, stream_to: TextIO | None) -> None:
        self.times: list[float] = []
        self._prompt_seen = False
        self._printer = None
        self._stream, self._begun = stream_to, False
        if stream_to is not None:
            self._printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self._printer.on_finalized_text = self._print

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        if self._printer is not None:
            self._printer.put(value)

    def _print(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        print(text, end="\n" if stream_end else "", flush=True, file=self._stream)

    def end(self) -> None:
        if self._printer is not None:
            self._printer.end()
