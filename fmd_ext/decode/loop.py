"""The token loop over static steps: greedy search and sampling as in transformers, without waiting for the device.

transformers' logits processors, warpers and stopping criteria run as they are, in their order. One thing differs: on
CUDA the next forward starts before the host knows whether generation goes on. The device then computes while the host
reads the stop flag, feeds a streamer and launches more work. If generation was over, that forward is undone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput

from fmd_ext.compat import cache_kwargs, cache_name
from fmd_ext.decode.sequence import StepSequence

# (model, cache, arguments of the first step, the most steps that can follow) -> the steps
Begin = Callable[[nn.Module, Any, dict[str, Any], int], StepSequence]


class StaticLoop:
    """A ``custom_generate`` callable: transformers prepares a call as ever and hands its token loop over.

    Args:
        begin: gives the steps.
        call: the arguments of ``generate``; transformers does not hand all of them on.
        run_ahead: see `DecodeRunner`.

    Attributes:
        report: what the steps ran on, once the call has ended.
    """

    def __init__(self, begin: Begin, call: dict[str, Any], run_ahead: bool | None) -> None:
        self.begin = begin
        self.run_ahead = run_ahead
        self.report = "decode runner: no step was needed"
        self.streamer = call.get("streamer")
        self.cache_is_given = call.get(cache_name()) is not None

    def __call__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        wants_dict = generation_config.return_dict_in_generate
        records: dict[str, Any] = {
            name: () for name in ("scores", "logits") if wants_dict and getattr(generation_config, f"output_{name}")
        }
        out = model._prefill(input_ids, generation_config, model_kwargs)
        logits = out.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        model_kwargs = model._update_model_kwargs_for_generation(out, model_kwargs)
        cache = model_kwargs[cache_name()]
        del out  # the prompt's logits may be many

        select = Selection(generation_config, stopping_criteria, input_ids)
        max_length = stopping_criteria.max_length
        run_ahead = self.run_ahead if self.run_ahead is not None else input_ids.device.type == "cuda"
        steps, undo = None, 0
        try:
            while True:
                scores = logits_processor(input_ids, logits)
                for name, value in (("scores", scores), ("logits", logits)):
                    if name in records:
                        records[name] += (value,)
                tokens = select(scores)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                select.send(stopping_criteria(input_ids, records.get("scores")))
                at_limit = max_length is not None and input_ids.shape[1] >= max_length
                if steps is None and not at_limit:
                    call = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                    remaining = sys.maxsize if max_length is None else max_length - input_ids.shape[1]
                    steps = self.begin(model, cache, call, remaining)
                if run_ahead and not at_limit:
                    raw = steps.feed(tokens)
                    undo = 1
                tokens_on_host, stops = select.receive()
                if self.streamer is not None:
                    self.streamer.put(tokens_on_host)
                if stops or at_limit:
                    break
                if not run_ahead:
                    raw = steps.feed(tokens)
                undo = 0
                logits = raw.to(copy=True, dtype=torch.float32, device=input_ids.device)
        finally:
            if steps is not None:
                steps.close(undo, keep_cache=wants_dict or self.cache_is_given)
                self.report = steps.describe()
        if self.streamer is not None:
            self.streamer.end()
        if not wants_dict:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, **cache_kwargs(cache), **records)


class Selection:
    """Chooses tokens, remembers which samples are done, and tells the host without making the device wait."""

    def __init__(self, config: Any, stopping_criteria: Any, input_ids: torch.Tensor) -> None:
        batch, device = input_ids.shape[0], input_ids.device
        self.do_sample = config.do_sample
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.pad = config._pad_token_tensor.to(device) if pads else None
        self.unfinished = torch.ones(batch, dtype=torch.long, device=device)
        on_cuda = device.type == "cuda"
        self._host = torch.empty(batch + 1, dtype=torch.long, pin_memory=on_cuda)
        self._arrived = torch.cuda.Event() if on_cuda else None

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Tokens [batch] from processed ``scores`` [batch, vocabulary]; padding where a sample is done."""
        if self.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        self._tokens = tokens if self.pad is None else tokens * self.unfinished + self.pad * (1 - self.unfinished)
        return self._tokens

    def send(self, done: torch.Tensor) -> None:
        """Notes which samples are done [batch] bool, and starts copying this and the last tokens to the host."""
        self.unfinished = self.unfinished & ~done
        self._host.copy_(torch.cat([self._tokens, self.unfinished.max()[None]]), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self.unfinished.device))

    def receive(self) -> tuple[torch.Tensor, bool]:
        """The tokens last sent, on the host, and whether all samples are done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host[:-1].clone(), not self._host[-1]
