"""What all readings share: where the answer stands, and text without what only decorates it."""

from __future__ import annotations

import re

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.S | re.I)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}")


def final_answer(text: str) -> str:
    """What stands in the last ``<answer>`` or ``\\boxed{}``, else behind the last ``</think>``; else all of it.

    A text that begins to think and never ends has no answer: "".
    """
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return ""
    if tagged := _TAGGED.findall(text):
        text = tagged[-1]
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    return text.strip()


def undecorated(text: str) -> str:
    """Without emphasis and quotation marks; apostrophes within words stay, as plain ones."""
    text = re.sub(r"[*_`\"“”„«»]+", "", text.replace("’", "'").replace("‘", "'").replace("`", "'"))
    return re.sub(r"(?<!\w)'|'(?!\w)", "", text).strip()


def plain(text: str) -> str:
    """`undecorated`, lower case, single spaces, without leading punctuation; lines end in a full stop."""
    text = re.sub(r"(?<![.!?:;,\s])\s*\n+", ". ", undecorated(text).lower())
    return re.sub(r"\s+", " ", text).lstrip(" .,:;-!([#>").strip()


def phrase(text: str) -> str:
    """Words alone, lower case, numbers as words, without a leading article."""
    words = re.findall(r"[^\W_]+", text.lower().replace("’", "'").replace("'s", " s"))
    words = [NUMBERS[int(word)] if word.isdecimal() and int(word) < len(NUMBERS) else word for word in words]
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)
