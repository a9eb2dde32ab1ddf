"""text_weight="auto": reads the question off a prompt, and asks the model itself which modality its answer needs.

docs/method.md defines it. The asking is text only, in a forward call of its own before the prompt; a question that has
been asked about once is not asked about again.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.engine.prompt import Prompt
from fmd_ext.engine.routes import NEEDS, Routes
from fmd_ext.engine.session import Session
from fmd_ext.labels import TEXT
from fmd_ext.patching.modality_question import MODALITY_QUESTIONS, ModalityQuestion

logger = logging.getLogger(__name__)

_MARK = "?fmd_ext?"  # stands for a question where a template is read
_CLOSING_TAG = re.compile(r"\s*</\w+>")  # behind a clip, where a family marks its end in plain text

KEPT_ROUTES = 4096  # questions
ASKED_AT_ONCE = 64
# Questions [n] -> probabilities [n, 3] of NEEDS.
Route = Callable[[Sequence[str]], Any]


class Router:
    """How questions are found in prompts, and how a model is asked about them.

    Args:
        processor: the model's processor, or its tokenizer where that has the chat template.
        wording: a language of `MODALITY_QUESTIONS`, or a `ModalityQuestion`.
        route: questions [n] -> probabilities [n, 3] of visual, audio, both, asked in the model's place.

    Raises:
        TypeError: a processor without a chat template.
        ValueError: an unknown language; answers whose first tokens are the same.
    """

    def __init__(self, processor: Any, wording: str | ModalityQuestion = "en", route: Route | None = None) -> None:
        if not hasattr(processor, "apply_chat_template") and not hasattr(processor, "render"):
            raise TypeError(f"a Router needs the model's processor, with its chat template; got {processor!r}")
        if isinstance(wording, str):
            if wording not in MODALITY_QUESTIONS:
                raise ValueError(f"wording must be one of {', '.join(MODALITY_QUESTIONS)}, or a ModalityQuestion")
            wording = MODALITY_QUESTIONS[wording]
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.wording = wording
        self.route = route
        before, self._closing = _chat().render_question(processor, _MARK).split(_MARK)
        self._opening = before.split()[-1] if before.split() else ""  # "<|im_start|>user", "USER:", "[INST]"
        self.answers = [] if route is not None else self._first_tokens()

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        """Itself: it knows no model."""
        return self

    def __eq__(self, other: object) -> bool:
        """Equal ones ask alike."""
        if not isinstance(other, Router):
            return NotImplemented
        return (self.processor is other.processor) and (self.wording, self.route) == (other.wording, other.route)

    __hash__ = None

    def question_of(self, ids: Any, labels: Any) -> str:
        """The question in a prompt: the text of its last turn behind its last clip, else before it.

        "" where there is none. ``ids`` [length], token ids, with their ``labels``.
        """
        ids, labels = np.asarray(ids), np.asarray(labels)
        clips = np.flatnonzero(labels > TEXT)
        behind = clips[-1] + 1 if len(clips) else 0
        question = self._last_turn(ids[behind:][labels[behind:] == TEXT])
        return question or self._last_turn(ids[labels == TEXT])

    def _last_turn(self, ids: np.ndarray) -> str:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = text.rstrip().removesuffix(self._closing.rstrip())
        if self._opening:
            text = text.rpartition(self._opening)[2]
        for token in self._special_tokens():
            text = text.replace(token, "")
        return _CLOSING_TAG.sub("", text.strip(), count=1) if _CLOSING_TAG.match(text) else text.strip()

    def _special_tokens(self) -> list[str]:
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt that asks which modality ``question`` needs."""
        text = self.wording.about(question)
        if self.tokenizer is self.processor:
            return self._ids(_chat().render_question(self.processor, text))
        return _chat().prepare_inputs(self.processor, [], text)["input_ids"][0].tolist()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _first_tokens(self) -> list[list[int]]:
        """For each of NEEDS the tokens that an answer may begin with, as the template goes on."""
        prompt = _chat().render_question(self.processor, self.wording.about("?"))
        blank = self._next_token(prompt, " ")  # tells no answer from another
        found = []
        for need in NEEDS:
            spellings = [mark + spelling for spelling in self.wording.answers[need] for mark in ("", " ")]
            found.append(sorted({self._next_token(prompt, spelling) for spelling in spellings} - {blank, None}))
        flat = [token for tokens in found for token in tokens]
        if len(flat) != len(set(flat)) or not all(found):
            raise ValueError(
                f"the answers {dict(self.wording.answers)} must begin with different tokens; in this tokenizer they "
                f"begin with {dict(zip(NEEDS, found, strict=True))}"
            )
        return found

    def _next_token(self, prompt: str, text: str) -> int | None:
        """The first token in which ``prompt + text`` differs from ``prompt``; None: it adds none."""
        before, after = self._ids(prompt), self._ids(prompt + text)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        return after[same] if same < len(after) else None


class Asking:
    """Asks one patched model about questions, and keeps the answers. One per patch.

    Attributes:
        last: the routes of the last prompt; None where nothing was asked about it.
    """

    def __init__(self, session: Session, entry: nn.Module, decoder: nn.Module, router: Router) -> None:
        self.session = session
        self.entry = entry
        self.decoder = decoder
        self.router = router
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self.last: Routes | None = None
        self._said = False

    def routes_of(self, ids: torch.Tensor, labels: np.ndarray) -> Routes:
        """The routes of a batch of prompts: token ids [batch, length] and labels [batch, at most length].

        Of a sample without a clip nothing is asked.
        """
        prompts = zip(ids.cpu().numpy(), labels, strict=True)
        self.last = self.routes(
            [
                self.router.question_of(own[: len(label)], label) if (label > TEXT).any() else ""
                for own, label in prompts
            ]
        )
        return self.last

    def routes_of_turn(self, ids: torch.Tensor) -> Routes:
        """The routes of a later turn, whose clips are cached: token ids [batch, length]."""
        self.last = self.routes([self.router.question_of(own, np.zeros(len(own))) for own in ids.cpu().numpy()])
        return self.last

    def routes(self, questions: Sequence[str]) -> Routes:
        """The routes of ``questions``; without a question, all that is there is asked for: both."""
        new = [q for q in dict.fromkeys(questions) if q and q not in self._kept]
        for start in range(0, len(new), ASKED_AT_ONCE):
            asked = new[start : start + ASKED_AT_ONCE]
            given = self._asked(asked) if self.router.route is None else self.router.route(asked)
            for question, route in zip(asked, Routes(given).probabilities, strict=True):
                self._kept[question] = route
        nothing = Routes.needing(["both"]).probabilities[0]
        found = np.stack([self._kept[question] if question else nothing for question in questions])
        while len(self._kept) > KEPT_ROUTES:
            self._kept.popitem(last=False)
        return Routes(found, tuple(question or None for question in questions))

    def _asked(self, questions: Sequence[str]) -> np.ndarray:
        """float32 [n, 3]: the model's own answers, by the probabilities of their first tokens."""
        before = self.session.last_call
        prompts = [self.router.prompt_ids(question) for question in questions]
        with self.session.receiving(Prompt(None), max(map(len, prompts))):
            found = answers_to(self.router, self.entry, self.decoder, prompts)
        self.session.last_call = before
        return found

    def tell_of_unread(self) -> None:
        """Warns once of a prompt whose question cannot be read."""
        if not self._said:
            self._said = True
            logger.warning(
                "fmd_ext: text_weight='auto' found no token ids to read a question from; both branches weigh the same "
                "at text positions of such prompts. Give input_ids, or the routes by handle.routed(...)"
            )


@torch.no_grad()
def answers_to(router: Router, entry: nn.Module, decoder: nn.Module, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """float32 [n, 3]: what the model answers to ``prompts`` of `Router.prompt_ids`, in one forward call of its text
    decoder: the probabilities of NEEDS, by the first tokens of their answers."""
    length = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    device = decoder.get_input_embeddings().weight.device
    out = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    hidden = out.last_hidden_state
    last = (mask.sum(1) - 1).to(hidden.device)
    logits = entry.get_output_embeddings()(hidden[torch.arange(len(prompts), device=hidden.device), last])
    scores = torch.stack([logits[:, tokens].float().logsumexp(1) for tokens in router.answers], 1)
    return scores.softmax(1).cpu().numpy()


def _chat() -> Any:
    """`fmd_ext.inputs.chat`, which loads what decodes clips: only who asks needs it."""
    return importlib.import_module("fmd_ext.inputs.chat")
