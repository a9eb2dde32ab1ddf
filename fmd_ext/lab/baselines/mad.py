"""Modality-adaptive decoding (MAD): Chung et al., CVPR 2026, arXiv 2601.21181; public code top-yun/MAD.

The model is asked, with the clip in the prompt, which modality the question needs. The scores of the first tokens of
"video", "audio" and "both" right behind the prompt give w_v, w_a and w_av by a softmax, once per question. Every token
is then decided by four runs: with both modalities, with video only, with audio only, and with text only,

    logits = (2 + 2 gamma w_av) l[both] + (1 - gamma (w_av - w_v)) l[video]
             + (1 - gamma (w_av - w_a)) l[audio] - gamma (w_v + w_a) l[text]

The public code drops a modality by building the prompt without it (neither its placeholders nor its features), with a
key-value cache for each of the four prompts; so does this. Its settings are gamma 2.5 and greedy decoding.

What differs from the public code: the logits are divided by 4, the sum of the coefficients, so that a sampling
temperature keeps its meaning; an answer is compared by all spellings of the wording and with and without a blank before
it (there by "audio", "video" and "both" without one), whose probabilities are added; the prompt that asks is the
caller's with the asking text behind the question, without "Question: " in front of it; it works per sample of a batch,
and samples without both video and audio are decoded plainly; a later turn on the same cache keeps the first one's
weights. A prompt of which a modality is dropped is that of a clip which lacks it where the placeholders of each
modality stand between markers of their own (Qwen2.5-Omni, Qwen3-Omni); elsewhere line breaks of the template may stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.adapters import AUDIO, VISUAL
from fmd_ext.lab.baselines.decoding import Method, Sequence, applied, check_range
from fmd_ext.lab.baselines.prompts import closing_ids, has_both, refuse_joint, with_question, without
from fmd_ext.patching.modality_question import MODALITY_QUESTIONS, ModalityQuestion
from fmd_ext.patching.routing import Router

# The prompt and the answers of the public code.
PUBLISHED = ModalityQuestion(
    "{question}\nTo answer this question, which modality is needed (audio, video, or both): ",
    {"visual": ("video",), "audio": ("audio",), "both": ("both",)},
)
VIDEO_ONLY, AUDIO_ONLY, TEXT_ONLY, ASKING = "video only", "audio only", "text only", "asking"
DROPPED = {VIDEO_ONLY: (AUDIO,), AUDIO_ONLY: (VISUAL,), TEXT_ONLY: (VISUAL, AUDIO)}
ONE_MODALITY = "decoded plainly: not both modalities"


@contextlib.contextmanager
def mad(
    model: nn.Module, *, processor: Any, gamma: float = 2.5, wording: str | ModalityQuestion = "published"
) -> Iterator[Method]:
    """Within this context ``model.generate`` decodes by MAD.

    Args:
        model: a supported model, not patched.
        processor: the model's; prompts must be built by it and padded on the left.
        gamma: 0 or more. 0 adds the logits of video only and audio only to twice those of both.
        wording: how the model is asked: ``"published"``, a language of ``MODALITY_QUESTIONS``, or a `ModalityQuestion`
            whose text begins with the question.

    The context's value has ``weights``, float32 [batch, 3], those of the last prompt in the order of NEEDS (visual,
    audio, both); rows of samples that are decoded plainly mean nothing.

    Raises:
        ValueError: a value out of range, a patched model, or, in ``generate``, joint positions, or a prompt that does
            not end as the processor's template ends a question.
        TypeError: a model that is not supported, or, in ``generate``, one whose features cannot be told apart.
    """
    check_range("gamma", gamma, 0)
    if isinstance(wording, str) and wording not in ("published", *MODALITY_QUESTIONS):
        known = ", ".join(MODALITY_QUESTIONS)
        raise ValueError(f"wording must be published, {known}, or a ModalityQuestion; got {wording!r}")
    router = Router(processor, PUBLISHED if wording == "published" else wording)
    before, _, asked = router.wording.text.partition("{question}")
    if before:
        raise ValueError(f"MAD asks behind the question: the wording must begin with {{question}}, got {before!r}")
    question = router.tokenizer(asked, add_special_tokens=False)["input_ids"]
    with applied(model, MAD(model, gamma, question, closing_ids(processor), router.answers)) as method:
        yield method


class MAD(Method):
    """See `mad`.

    Attributes:
        weights: float32 [batch, 3] of the last prompt.
    """

    def __init__(
        self, model: nn.Module, gamma: float, question: list[int], closing: list[int], answers: list[list[int]]
    ) -> None:
        super().__init__()
        self.model, self.gamma, self.question, self.closing, self.answers = model, gamma, question, closing, answers
        self.weights: Tensor | None = None

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        refuse_joint(sequence.labels, "MAD")
        sequence.measured = both = has_both(sequence.labels)
        self.notes = [{} if has else {ONE_MODALITY: ""} for has in both.tolist()]
        if both.any():
            sequence.add_runs(ASKING, *DROPPED)

    def arguments(self, name: str, call: dict[str, Any]) -> dict[str, Any]:
        if name == ASKING:
            return with_question(call, self.question, self.closing)
        return without(self.model, call, DROPPED[name])

    def logits(self, sequence: Sequence, plain: Tensor, second: Callable[[str], Tensor]) -> Tensor:
        if not sequence.runs:
            return plain
        if ASKING in sequence.runs:
            scores = second(ASKING)
            found = torch.stack([scores[:, tokens].logsumexp(-1) for tokens in self.answers], -1).softmax(-1)
            self.weights = found
            sequence.measured = sequence.measured, found
            del sequence.runs[ASKING]
        both, weights = sequence.measured
        visual, audio, needs_both = weights.unsqueeze(1).unbind(-1)
        gamma = self.gamma
        mixed = (2 + 2 * gamma * needs_both) * plain
        mixed = mixed + (1 - gamma * (needs_both - visual)) * second(VIDEO_ONLY)
        mixed = mixed + (1 - gamma * (needs_both - audio)) * second(AUDIO_ONLY)
        mixed = mixed - gamma * (visual + audio) * second(TEXT_ONLY)
        return torch.where(both[:, None], mixed / 4, plain)
