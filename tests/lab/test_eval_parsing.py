"""Parsing answers, and the traps in which looser scorers fall."""

from __future__ import annotations

import pytest

from fmd_ext.lab.eval.parsing import normal_word, parse_choice, parse_word, parse_yes_no

ANIMALS = ("a dog", "cat", "guinea pig", "none of them")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" **Yes**, it is barking.", "yes"),
        ("NO, the dog is silent", "no"),
        ("Yes the dog is barking", "yes"),
        ("No there is nothing to hear.", "no"),
        ("The answer is yes.", "yes"),
        ("Answer: No", "no"),
        ("Based on the sound, the correct answer is: no", "no"),
        ("No\nBecause nothing is heard.", "no"),
        # The traps: letters within other words, hedges, echoes, and sentences that answer only by inference.
        ("I know that sound", None),
        ("yesterday", None),
        ("Nothing is visible", None),
        ("not sure", None),
        ("No idea.", None),
        ("No one can tell", None),
        ("Yes or no", None),
        ("yes and no", None),
        ("Yes/No", None),
        ("The dog is barking.", None),
        ("", None),
    ],
)
def test_yes_no(text, expected):
    assert parse_yes_no(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("D. none of them", "D"),
        ("A) a dog", "A"),
        ("**B**", "B"),
        ("B the cat", "B"),
        ("Option C", "C"),
        ("The answer is (B).", "B"),
        ("The correct option is B because it meows", "B"),
        ("Answer: B", "B"),
        ("answer is: d", "D"),
        ("Guinea pig.", "C"),
        ("dog", "A"),
        ("The answer is the cat.", "B"),
        # The traps: letters of other words, articles, letters that are no choice, several answers.
        ("Answer", None),
        ("A cat can be seen and heard in this scene.", None),
        ("I think so", None),
        ("E", None),
        ("Because", None),
        ("The answer is A. No, the answer is B.", None),
        ("It is not a dog", None),
        ("cat or guinea pig", None),
        ("B or C", None),
        ("(B) and (C).", None),
        ("B, C", None),
        ("A/D", None),
        ("The answer is B or D.", None),
        ("B, and C too", None),
        ("C. A guinea pig is seen.", "C"),
        ("B, A cat that meows", "B"),
        ("a good question", None),
        ("", None),
    ],
)
def test_choice(text, expected):
    assert parse_choice(text, ANIMALS) == expected


def test_choices_with_one_text_are_not_told_apart_by_it():
    assert parse_choice("dog", ("dog", "a dog", "cat")) is None
    assert parse_choice("B", ("dog", "a dog", "cat")) == "B"


COUNTS = ("zero", "one", "two", "ten", "more than ten")
WORDS = ("yes", "no", "left", "right", "acoustic_guitar", "electric bass", "drum")


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("two", COUNTS, "two"),
        ("2", COUNTS, "two"),
        ("There are 2 instruments.", COUNTS, "two"),
        ("More than ten.", COUNTS, "more than ten"),
        ("There are more than ten of them.", COUNTS, "more than ten"),
        ("ten", COUNTS, "ten"),
        ("Acoustic guitar", WORDS, "acoustic_guitar"),
        ("It is the drum.", WORDS, "drum"),
        ("Yes, the drum plays.", WORDS, "yes"),
        ("one or two", COUNTS, None),
        ("several", COUNTS, None),
        ("someone", COUNTS, None),
        ("12", COUNTS, None),
        ("The drum is on the left", WORDS, None),
        ("It is not the drum.", WORDS, None),
        ("It isn’t on the left", WORDS, None),
        ("No, it is not the drum.", WORDS, "no"),
        ("There is another drum, I note.", WORDS, "drum"),
        ("bright", WORDS, None),
        ("", WORDS, None),
    ],
)
def test_word(text, options, expected):
    assert parse_word(text, options) == expected


def test_published_words_are_normalised_alike():
    assert normal_word("More than ten") == "more than ten"
    assert normal_word("acoustic_guitar") == "acoustic guitar"
    assert normal_word("3") == "three"
