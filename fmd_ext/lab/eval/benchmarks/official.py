"""How each benchmark's own script, or the code whose figures are quoted, reads answers: ``--protocol official``.

These readings are kept with their faults, so that a figure can be put beside a published one. The ways in which they
differ from `fmd_ext.lab.eval.parsing` are told in docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from fmd_ext.lab.eval.items import Item


@dataclasses.dataclass(frozen=True)
class Official:
    """A reading.

    Args:
        read: from item and raw text to the answer, normalised like ``item.answer``; None: unread.
        skips_unread: unread answers are left out of the denominator, not counted as wrong.
        source: whose it is.
    """

    read: Callable[[Item, str], str | None]
    source: str
    skips_unread: bool = False


def label_within(item: Item, text: str) -> str | None:
    """The right label wherever its letters occur, also within other words: "yes, I know" is right for either label."""
    text, other = text.lower(), {"yes": "no", "no": "yes"}[item.answer]
    return item.answer if item.answer in text else other if other in text else None


def label_at_the_start(item: Item, text: str) -> str | None:
    """The right label within the first five characters, also within another word: "I know" is no. "Yesno" is right for
    either label."""
    return label_within(item, text.strip()[:5])


def letter_at_the_start(item: Item, text: str) -> str | None:
    """The first letter, where it is A to D, also in lower case and of a word: "Both" is B. Of a reply that contains
    "assistant" only what follows counts."""
    _, marked, rest = text.partition("assistant")
    found = re.match(r"\s*([A-D])", rest if marked else text, re.IGNORECASE)
    return found[1].upper() if found else None


# Of the phrases that the script lists four work; commas are missing between the rest, "Best answer: C" is B.
_ANNOUNCING = re.compile(r"The (?:best|correct) answer is|The answer(?: is)?")


def first_capital(item: Item, text: str) -> str | None:
    """The first capital A to D anywhere, once what announces an answer is taken out: "A dog barks" is A."""
    found = re.search(r"[ABCD]", _ANNOUNCING.sub("", text.strip()))
    return found[0] if found else None


def letter_anywhere(item: Item, text: str) -> str:
    """The only letter of a choice that occurs anywhere, else the last in brackets, else the first in the alphabet.

    Without a letter, in replies of more than five words, the option whose text occurs last. Nothing at all is A.
    """
    letters = [chr(ord("A") + index) for index in range(len(item.options))]
    for mark in ",.!?;:'":
        text = text.strip(mark)
    found = {letter: text.rfind(f"({letter})") for letter in letters if letter in text}
    if not found and len(text.split()) > 5:
        texts = dict(zip(letters, (option.lower() for option in item.options), strict=True))
        found = {letter: text.lower().rfind(words) for letter, words in texts.items() if words in text.lower()}
    return max(found, key=lambda letter: found[letter], default="A")


AVHBENCH = Official(label_within, "substring scoring as in public code of AVCD; AVHBench's repository has no scorer")
CMM = Official(label_at_the_start, "the authors' evaluation/calculate_score.py")
DAILY_OMNI = Official(letter_at_the_start, "the authors' test_model/Qwen2.5-Omni/testmodel.py")
VIDEO_MME = Official(first_capital, "the authors' eval_your_results.py", skips_unread=True)
WORLDSENSE = Official(letter_anywhere, "its task in lmms-eval 0.7.3")
