"""Reads the letter of a choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from fmd_ext.lab.eval.parsing.text import phrase, undecorated

# Behind a letter: "or C", ", C", "/C"; not ", A dog barks".
_ANOTHER = re.compile(r"[\s.):\]]*(?:,|/|&|or\b|and\b)\s*(?:or\s|and\s)?[(\[]?([A-Z])(?![A-Za-z'’]|(?<=[AI])\s+[a-z])")

_NAMES = r"(?:(?:correct|right|best|final|my|most likely|appropriate)\s+)*(?:answer|option|choice)"
_IS = r"(?:\s*(?:is|was|would be|should be|must be|will be|seems to be|appears to be|:|=))"
# What stands before a letter or before the words of an option.
_LEADS = re.compile(
    rf"\b(?:{_NAMES}(?:\s+(?:here|to (?:the|this) question))?{_IS}+:?"
    r"|(?:i(?:'d| would| will|'ll)?|let's)\s+(?:choose|pick|select|go with|go for|say|answer|opt for)(?:\s+with)?:?"
    r"|(?:it|this|that|these|those|he|she|they)(?:\s+(?:is|are|was|were|must be|would be|should be)|'s|'re):?"
    r"|(?:therefore|thus|hence|so),?)\s*",
    re.I,
)
_NAMED = re.compile(rf"\b{_NAMES}\s+(?=[(\[]?[A-Z]\b)", re.I)  # "option B"
_CONFIRMED = re.compile(
    r"(?:^|[.:;!?\n,]\s*)[(\[]?([A-Z])[)\]]?\s+(?:is|would be|seems|must be)\s+"
    r"(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer|true|likely)\b"
)
_LAST_LINE = re.compile(r"\n\s*[(\[]?([A-Z])[)\].]*\s*$")


def parse_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of a choice (``"A"`` for the first of ``options``) or None.

    Accepted: the words of exactly one option; a letter at the start that punctuation follows or nothing, or any letter
    but A and I before a word; a letter, or the words of an option, after "the answer is", "I choose", "it is" and the
    like; a letter alone in the last line. All that is found must be the same.
    """
    letters = [chr(ord("A") + index) for index in range(len(options))]
    said = undecorated(text)
    lettered = _leading_letter(said, letters)[0] is not None
    if quoted := _quoted(said, letters, options, (_exact,) if lettered else (_exact, phrase)):
        return quoted
    found = set(_found(said, letters, options))
    return found.pop() if len(found) == 1 else None


def _found(said: str, letters: list[str], options: tuple[str, ...]) -> Iterator[str | None]:
    """All that the text names; None for something that is no single choice, such as "B or C"."""
    letter, rest, several = _leading_letter(said, letters)
    if several:
        yield None
    if letter:
        yield letter
        if words := _quoted(rest, letters, options):
            yield words  # "B. a dog" where a dog is A is no answer
    for pattern in (_LEADS, _NAMED):
        for match in pattern.finditer(said):
            tail = said[match.end() :]
            letter, _, several = _leading_letter(tail, letters, strict=match[0].strip().lower().startswith("so"))
            if several:
                yield None
            if letter:
                yield letter
            elif words := _quoted(re.split(r"(?<=[^.\s])[.!?](?:\s|$)|[;\n]", tail)[0], letters, options):
                yield words
    for match in _CONFIRMED.finditer(said):
        if match[1] in letters:
            yield match[1]
    if (last := _LAST_LINE.search(said)) and last[1] in letters:
        yield last[1]


def _exact(text: str) -> str:
    return re.sub(r"\s+", " ", undecorated(text)).strip(" .").lower()


def _quoted(
    text: str,
    letters: list[str],
    options: tuple[str, ...],
    normals: Sequence[Callable[[str], str]] = (_exact, phrase),
) -> str | None:
    """The option whose words these are, word for word; by its punctuation where only that tells options apart."""
    for normal in normals:
        said = normal(text)
        equal = [letter for letter, option in zip(letters, options, strict=True) if said and normal(option) == said]
        if len(equal) == 1 and said.upper() not in letters:
            return equal[0]
    return None


def _leading_letter(text: str, letters: list[str], *, strict: bool = False) -> tuple[str | None, str, bool]:
    """The letter at the start, what follows it, and whether it is one of several ("B or C").

    ``strict``: only a letter that punctuation follows, or nothing.
    """
    match = re.match(r"\s*(?:option\s+|choice\s+)?[(\[]?([A-Za-z])(?![A-Za-z'’])", text, re.I)
    if not match or match[1].upper() not in letters:
        return None, "", False
    letter, rest = match[1].upper(), text[match.end() :]
    if (another := _ANOTHER.match(rest)) and another[1] in letters:
        return None, "", another[1] != letter
    if re.match(r"[)\]]?\s*[(\[][A-Za-z][)\]]", rest):
        return None, "", False  # "(c)(a)(d)" is an order, not a choice
    named = match[0].strip().lower().startswith(("option", "choice"))
    bracketed = "(" in match[0] or "[" in match[0]
    if bracketed or named or re.match(r"\s*(?:$|[.:),;\]\n-])", rest):
        return letter, rest.lstrip(" .:),;]-"), False
    if strict or re.match(r"\s+(?:is|are|was|isn't|can't|cannot|seems|would|must)\b", rest):
        return None, "", False  # "B is wrong" is no choice of B; "B is correct" is found by its own pattern
    # Before a word: "B the dog" is an answer, "A dog" and "I think" are sentences; a small letter is no answer there.
    return (letter, rest, False) if match[1].isupper() and letter not in "AI" else (None, "", False)
