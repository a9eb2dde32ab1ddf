"""What the ports share that are a text decoder behind encoders: the decoder's call, and how they generate.

Their official code generates from embeddings. Ours takes token ids, from which fork-merge decoding reads what each
position is. So whatever reads ids while generating must count the answer only, or tokens differ from the official ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fmd_ext.compat import cache_kwargs, cache_of

# These get the whole sequence: the first calls the user's function, the second starts from the prompt's last token and
# cannot run from embeddings at all.
_SEE_ALL = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
_OF_ENCODERS = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}  # and what switches them off


class AnswerProcessor(LogitsProcessor):
    """Shows a logits processor the answer's ids, without the prompt's first ``prompt_len``."""

    def __init__(self, processor: LogitsProcessor, prompt_len: int) -> None:
        self.processor = processor
        self.prompt_len = prompt_len

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(input_ids[:, self.prompt_len :], scores)


class AnswerCriterion(StoppingCriteria):
    """Shows a stopping criterion the answer's ids, without the prompt's first ``prompt_len``."""

    def __init__(self, criterion: StoppingCriteria, prompt_len: int) -> None:
        self.criterion = criterion
        self.prompt_len = prompt_len

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return self.criterion(input_ids[:, self.prompt_len :], scores, **kwargs)


class EmbeddingsGenerationMixin(GenerationMixin):
    """A base of models with an ``lm_head``. Settings of ``generate`` act as in a call from embeddings.

    Processors and stop strings that follow from settings see the answer only, in a batch with padding too. What a user
    hands over as objects or functions sees prompt and answer, as in every model that is given ids.

    Attributes:
        features: arguments of ``forward`` that bring clips. They are dropped once the prompt is cached.
    """

    features: tuple[str, ...] = ()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,  # by its name here transformers knows that embeddings are taken
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {name: value for name, value in kwargs.items() if name not in self.features}
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    # The two methods by which transformers 5.17 to 5.24 makes processors and criteria; it calls them in this order.

    def _get_logits_processor(
        self,
        generation_config: Any,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        prefix_allowed_tokens_fn: Any = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        device: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        prompt_len = generation_config._fmd_prompt_len = input_ids_seq_length or 0
        settings = copy.copy(generation_config)
        for name in ("max_length", "min_length"):
            if getattr(settings, name) is not None:
                setattr(settings, name, max(getattr(settings, name) - prompt_len, 0))
        for name, off in _OF_ENCODERS.items():
            if getattr(settings, name, None) not in (None, off):
                warnings.warn(f"{name} reads a prompt's ids, and this model has embeddings: ignored", stacklevel=3)
            setattr(settings, name, None)
        given = logits_processor or []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Passing `\w+` with `inputs_embeds` and without `input_ids`")
            # Without model_kwargs: by the prompt's padding a repetition penalty would skip tokens of the answer.
            processors = super()._get_logits_processor(
                settings, 0, None, prefix_allowed_tokens_fn, given, device, None, **kwargs
            )
        whole = {id(processor) for processor in given}
        return LogitsProcessorList(
            processor
            if id(processor) in whole or isinstance(processor, _SEE_ALL)
            else AnswerProcessor(processor, prompt_len)
            for processor in processors
        )

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Sequence[StoppingCriteria] | None, tokenizer: Any = None
    ) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        whole = {id(criterion) for criterion in stopping_criteria or ()}
        return StoppingCriteriaList(
            AnswerCriterion(criterion, generation_config._fmd_prompt_len)
            if isinstance(criterion, StopStringCriteria) and id(criterion) not in whole
            else criterion
            for criterion in criteria
        )

    def _answer(
        self, decoder: nn.Module, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor, **call: Any
    ) -> CausalLMOutputWithPast:
        """Runs ``decoder(**call)`` and the head, for so many last positions (0: all) or at the indices to keep."""
        outputs = decoder(**call, return_dict=True)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.get_text_config().vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_kwargs(cache_of(outputs)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def refuse_beside_embeds(**features: Any) -> None:
    """Raises ValueError for features in a call that has embeddings, which would not be looked at."""
    given = [name for name, value in features.items() if value is not None]
    if given:
        raise ValueError(f"inputs_embeds already hold the clip; got {', '.join(given)} beside them")
