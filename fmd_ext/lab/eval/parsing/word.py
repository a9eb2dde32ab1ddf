"""Reads one of a closed set of short answers, as MUSIC-AVQA has them."""

from __future__ import annotations

import re

from fmd_ext.lab.eval.parsing.text import NUMBERS, phrase, plain
from fmd_ext.lab.eval.parsing.yes_no import NO_ANSWER, asks_yes_or_no, parse_yes_no

MORE = "more than ten"
# Near names of answers, by what people write for them.
NEAR = {
    "inside": "indoor",
    "outside": "outdoor",
    "center": "middle",
    "centre": "middle",
    "central": "middle",
    "leftmost": "left",
    "rightmost": "right",
    "simultaneous": "simultaneously",
    "at the same time": "simultaneously",
    "sax": "saxophone",
    "bass guitar": "electric bass",
    "guitar": "acoustic guitar",
    "zither": "guzheng",
    "none": "zero",
    "single": "one",
    "dozen": MORE,
    **dict.fromkeys(
        "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty".split(), MORE
    ),
}
_DENIAL = re.compile(r"\b(?:no|not|neither|nor|never|without|cannot)\b|n't\b")
_MORE = re.compile(r"\b(?:over|above) ten\b")
_BOUND = re.compile(r"\b(?:more|less|fewer|greater) than (?!ten\b)\w+|\b(?:at least|at most|up to|over|under) \w+")
_NO_THING = re.compile(rf"^(?:there (?:is|are) |i (?:hear|see) )?no (?!(?:{NO_ANSWER})\b)\w+(?: \w+){{0,6}}$")


def parse_word(text: str, options: tuple[str, ...], question: str = "") -> str | None:
    """One of ``options`` or None. Digits and number words are the same, and so are spaces and underscores, a word and
    its plural, an answer and its near names (`NEAR`).

    Accepted: text that is an option; a yes or no where that is asked; otherwise the only option that occurs as whole
    words, unless something is denied: "not the drum" names what is wrong. Of a count "no violins" is zero.
    """
    known = {phrase(option): option for option in options}
    said = _counted(text, known)
    if said in known:
        return known[said]
    if {"yes", "no"} <= known.keys() and (not question or asks_yes_or_no(question) or len(known) == 2):
        verdict = parse_yes_no(text, question)
        if verdict:
            return known[verdict]
    if "zero" in known and _NO_THING.match(phrase(text)):
        return known["zero"]
    if _DENIAL.search(plain(text)) or ("zero" in known and _BOUND.search(said)):
        return None
    # A longer option hides the shorter ones within it: "more than ten" is not "ten".
    names = {name: name for name in known if name not in ("yes", "no")}
    names |= {near: name for near, name in NEAR.items() if name in known and near not in known}
    found, rest = [], f" {said} "
    for name in sorted(names, key=len, reverse=True):
        if f" {name} " in rest:
            found.append(known[names[name]])
            rest = rest.replace(f" {name} ", " | ")
    return found[0] if len(set(found)) == 1 else None


def _counted(text: str, known: dict[str, str]) -> str:
    """The phrase with near names, plurals and large numbers as the options have them."""
    text = re.sub(r"(\d+)\s*\+", lambda m: MORE if int(m[1]) >= len(NUMBERS) - 1 else m[0], text)
    words = []
    for word in phrase(text).split():
        if word.isdecimal() and MORE in known:  # of the others `phrase` has made words
            word = MORE
        elif word not in known:
            word = next((form for form in _singular(word) if form in known or _ends_an_option(form, known)), word)
        words.append(word)
    said = " ".join(words)
    if MORE in known:
        said = _MORE.sub(MORE, said)
    whole = NEAR.get(said)
    return whole if whole in known else said


def _singular(word: str) -> list[str]:
    return [word[:-1]] * (word.endswith("s") and len(word) > 3) + [f"{word}s"]


def _ends_an_option(word: str, known: dict[str, str]) -> bool:
    """Of "acoustic guitars" the last word is made singular though it is no option by itself."""
    return any(name.endswith(f" {word}") for name in known)
