"""Reads the answer out of what a model says. What is not clearly an answer is None, never a guess.

Substring tests take "I don't know" for "no", and parsers that look for the first capital letter take "Answer: B" and
"A dog barks" for A. Here an answer stands at the start, or after words that announce it, or is all there is.
"""

from __future__ import annotations

import re

from fmd_ext.lab.eval.items import Item

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# What may follow a leading "no" that answers: "No the dog is silent", but not "No idea" or "No one knows".
_SUBJECTS = "the|there|it|this|that|these|those|i|we|you|he|she|they|its|his|her|their|because|since|as"
_ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice)(?: here| to (?:the|this) question)?(?: is| would be|:)+:?\s*(.*)", re.S
)

_DENIAL = re.compile(r"\b(?:not|neither|nor|never|without)\b|n['’]t\b")

# Behind a letter: "or C", ", C", "/C"; not ", A dog barks".
_ANOTHER = re.compile(r"[\s.):\]]*(?:,|/|&|or\b|and\b)\s*(?:or\s|and\s)?[(\[]?([A-Z])(?![A-Za-z'’]|(?<=[AI])\s+[a-z])")


def parse_answer(item: Item, text: str) -> str | None:
    """The answer to ``item`` that ``text`` gives, normalised like ``item.answer``; None where it gives none.

    A caption is its own answer: the text without surrounding space.
    """
    if item.kind == "yes-no":
        return parse_yes_no(text)
    if item.kind == "choice":
        return parse_choice(text, item.options)
    if item.kind == "word":
        return parse_word(text, item.options)
    return text.strip() or None


def parse_yes_no(text: str) -> str | None:
    """``"yes"``, ``"no"`` or None."""
    plain = _plain(text)
    announced = _ANNOUNCED.search(plain)
    for candidate in (plain, announced.group(1).strip() if announced else ""):
        match = re.match(r"(yes|no)\b", candidate)
        if not match:
            continue
        rest = candidate[match.end() :].lstrip(" ")
        if re.match(r"(?:/|,? ?(?:and|or) )(?:yes|no)\b", rest):
            continue  # "yes or no" repeats the question, "yes and no" does not answer it
        if match[1] == "no" and rest and rest[0].isalnum() and not re.match(rf"(?:{_SUBJECTS})\b", rest):
            continue
        return match[1]
    return None


def parse_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of a choice (``"A"`` for the first of ``options``) or None.

    Accepted: a letter at the start that punctuation follows or nothing, or any letter but A and I before a word; a
    letter after "answer is", "Answer:" and the like; the text of exactly one option.
    """
    letters = [chr(ord("A") + index) for index in range(len(options))]
    stripped = _without_emphasis(text)
    found = _leading_letter(stripped, letters)
    if found:
        return found
    announced = {
        letter
        for match in re.finditer(r"\b(?:answer|option|choice)(?: is| would be|:)*:?\s+", stripped, re.I)
        if (letter := _leading_letter(stripped[match.end() :], letters))
    }
    if announced:
        return announced.pop() if len(announced) == 1 else None
    said = _phrase(stripped)
    match = _ANNOUNCED.search(stripped.lower())
    tail = _phrase(match[1]) if match else None
    equal = {letter for letter, option in zip(letters, options, strict=True) if _phrase(option) in (said, tail)}
    return equal.pop() if len(equal) == 1 else None


def parse_word(text: str, options: tuple[str, ...]) -> str | None:
    """One of ``options`` or None. Digits and number words are the same, and so are spaces and underscores.

    Accepted: text that is an option; a leading yes or no; otherwise the only option that occurs as whole words, unless
    something is denied: "not the drum" names what is wrong.
    """
    known = {_phrase(option): option for option in options}
    said = _phrase(text)
    if said in known:
        return known[said]
    if {"yes", "no"} <= known.keys() and (verdict := parse_yes_no(text)):
        return known[verdict]
    if _DENIAL.search(text.lower()):
        return None
    # A longer option hides the shorter ones within it: "more than ten" is not "ten".
    found, rest = [], f" {said} "
    for phrase in sorted(known.keys() - {"yes", "no"}, key=len, reverse=True):
        if f" {phrase} " in rest:
            found.append(known[phrase])
            rest = rest.replace(f" {phrase} ", " | ")
    return found[0] if len(found) == 1 else None


def normal_word(text: str) -> str:
    """A published answer as `parse_word` gives it: lower case, number words, single spaces."""
    return _phrase(text)


def _leading_letter(text: str, letters: list[str]) -> str | None:
    match = re.match(r"\s*(?:option\s+|choice\s+)?[(\[]?([A-Za-z])(?![A-Za-z'’])", text)
    if not match or match[1].upper() not in letters:
        return None
    letter, rest = match[1].upper(), text[match.end() :]
    if (another := _ANOTHER.match(rest)) and another[1] in letters:
        return None  # "B or C" is no answer
    bracketed = match[0].strip()[0] in "(["
    if bracketed or re.match(r"\s*(?:$|[.:),;\]\n-])", rest):
        return letter
    # Before a word: "B the dog" is an answer, "A dog" and "I think" are sentences; a small letter is no answer there.
    return letter if match[1].isupper() and letter not in "AI" else None


def _without_emphasis(text: str) -> str:
    return re.sub(r"[*_`\"“”]+", "", text).strip()


def _plain(text: str) -> str:
    """Lower case, without emphasis and leading punctuation, single spaces."""
    return re.sub(r"\s+", " ", _without_emphasis(text).lower()).lstrip(" .,:;-!([")


def _phrase(text: str) -> str:
    """Words alone, lower case, numbers as words, without a leading article."""
    words = re.findall(r"[^\W_]+", text.lower().replace("’", "'").replace("'s", " s"))
    words = [NUMBERS[int(word)] if word.isdecimal() and int(word) < len(NUMBERS) else word for word in words]
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)
