"""Answers read as a person reads them: the table of `eval_answers`, and what holds of all of it."""

from __future__ import annotations

import pytest

from eval_answers import ANIMALS, CHOICES, NEITHER, WORDS, YES_AND_NO
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.parsing import final_answer, normal_word, parse_answer, parse_choice, parse_word, parse_yes_no

YES_NO = [(q, text, verdict) for q, *texts in YES_AND_NO for text, verdict in zip(texts, ("yes", "no"), strict=True)]
YES_NO += [(question, text, None) for question, text in NEITHER]


def item(kind, question="", options=(), answer=""):
    return Item("i", "v", None, question, kind, answer, tuple(options))


def test_the_table_is_large_and_balanced():
    assert len(YES_NO) + len(CHOICES) + len(WORDS) >= 250
    verdicts = [verdict for _, _, verdict in YES_NO]
    assert verdicts.count("yes") == verdicts.count("no") >= 90
    answers = [text for _, text, _ in YES_NO] + [text for _, text, _ in CHOICES] + [text for *_, text, _ in WORDS]
    assert len({(text, str(row)) for text, row in zip(answers, [*YES_NO, *CHOICES, *WORDS], strict=True)}) == len(
        answers
    )


@pytest.mark.parametrize("question, text, expected", YES_NO)
def test_yes_no(question, text, expected):
    assert parse_answer(item("yes-no", question), text) == expected


@pytest.mark.parametrize("options, text, expected", CHOICES)
def test_choice(options, text, expected):
    assert parse_answer(item("choice", options=options), text) == expected


@pytest.mark.parametrize("question, options, text, expected", WORDS)
def test_word(question, options, text, expected):
    assert parse_answer(item("word", question, options), text) == expected


@pytest.mark.parametrize(
    "text", ["No dog is visible.", "There is no dog", "There are no dogs.", "I hear no dog", "It is not"]
)
def test_a_denial_by_its_form_needs_no_question(text):
    assert parse_yes_no(text) == "no"


@pytest.mark.parametrize("text", ["The dog is visible.", "The dog is not visible.", "It is a dog", "I know that sound"])
def test_what_a_sentence_is_about_is_unknown_without_the_question(text):
    assert parse_yes_no(text) is None


def test_choices_with_one_text_are_not_told_apart_by_it():
    assert parse_choice("dog", ("dog", "a dog", "cat")) == "A"  # word for word
    assert parse_choice("the dog", ("dog", "a dog", "cat")) is None
    assert parse_choice("B", ("dog", "a dog", "cat")) == "B"
    assert parse_choice("B", ("B", "A", "C")) == "B"  # the letter of the second, not the text of the first


def test_two_options_alone_are_yes_and_no_without_a_question():
    assert parse_word("It is not.", ("yes", "no")) == "no"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain", "plain"),
        ("<think>a</think>b</think> c ", "c"),
        ("a</think>b", "b"),
        ("<think>never ends", ""),
        ("<answer>a</answer> or <ANSWER>b</ANSWER>.", "b"),
        ("<answer>cut off", "cut off"),
        ("the answer is \\boxed{\\text{no}}", "no"),
    ],
)
def test_where_the_answer_stands(text, expected):
    assert final_answer(text) == expected


def test_captions_are_without_what_was_thought():
    assert parse_answer(item("caption"), "<think>Hm.</think>\nA dog barks. ") == "A dog barks."
    assert parse_answer(item("caption"), " ") is None


def test_published_words_are_normalised_alike():
    assert normal_word("More than ten") == "more than ten"
    assert normal_word("acoustic_guitar") == "acoustic guitar"
    assert normal_word("3") == "three"


def test_the_letter_before_another_options_words_is_no_answer():
    assert parse_choice("C. cat", ANIMALS) is None and parse_choice("B. cat", ANIMALS) == "B"
