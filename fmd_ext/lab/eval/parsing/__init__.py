"""Reads the answer out of what a model says, as a careful person does. What is not clearly an answer is None.

Substring tests take "I don't know" for "no", and parsers that look for the first capital letter take "Answer: B" and
"A dog barks" for A. Here an answer stands at the start, or after words that announce it, or is all there is, or is a
sentence that says what the question asks. Two answers that contradict each other are none.
"""

from __future__ import annotations

from collections.abc import Callable

from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.parsing.choice import parse_choice
from fmd_ext.lab.eval.parsing.text import NUMBERS, final_answer, phrase
from fmd_ext.lab.eval.parsing.word import parse_word
from fmd_ext.lab.eval.parsing.yes_no import parse_yes_no

__all__ = [
    "NUMBERS",
    "final_answer",
    "judged",
    "normal_word",
    "parse_answer",
    "parse_choice",
    "parse_word",
    "parse_yes_no",
]


def parse_answer(item: Item, text: str) -> str | None:
    """The answer to ``item`` that ``text`` gives, normalised like ``item.answer``; None where it gives none.

    What a model thinks aloud before its answer does not count. A caption is its own answer: the text without
    surrounding space.
    """
    text = final_answer(text)
    if item.kind == "yes-no":
        return parse_yes_no(text, item.question)
    if item.kind == "choice":
        return parse_choice(text, item.options)
    if item.kind == "word":
        return parse_word(text, item.options, item.question)
    return text.strip() or None


def normal_word(text: str) -> str:
    """A published answer as `parse_word` gives it: lower case, number words, single spaces."""
    return phrase(text)


def judged(
    item: Item, raw: str, read: Callable[[Item, str], str | None] = parse_answer
) -> tuple[str | None, float | None]:
    """The answer that a text gives, and its score: 1 or 0, None for a caption. ``read``: by which reading."""
    parsed = parse_answer(item, raw) if item.kind == "caption" else read(item, raw)
    return parsed, None if item.kind == "caption" else float(parsed == item.answer)
