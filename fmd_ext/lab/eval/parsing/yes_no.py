"""Reads yes or no: from the word itself, or from a sentence that says or denies what the question asks.

"No dog is visible." is as much an answer as "Yes, it is.". A reading that knows only the words "yes" and "no" takes the
one for an answer and not the other, and so favours models that agree.
"""

from __future__ import annotations

import re

from fmd_ext.lab.eval.parsing.text import plain

YES, NO = "yes", "no"
# "no" before these is no answer: "No idea", "No one can tell".
NO_ANSWER = (
    "idea|clue|one|information|info|answer|way|comment|problem|doubt|wonder|question|guess|certainty|need|matter|"
    "context|reason|longer|worries"
)
# What may follow a leading "no" that answers: "No the dog is silent", but not "No idea" or "No one knows".
_SUBJECTS = "the|there|it|this|that|these|those|i|we|you|he|she|they|its|his|her|their|because|since|as|not"
_WORDS = {
    YES: "yes|yeah|yep|yup|affirmative|absolutely|certainly|definitely|indeed|of course|sure|true|correct|right",
    NO: "no|nope|nah|negative|absolutely not|certainly not|definitely not|of course not|not at all|false|incorrect|"
    "wrong|not really",
}
_WORD = re.compile(rf"(?P<no>{_WORDS[NO]})(?!\w|')|(?P<yes>{_WORDS[YES]})(?!\w|')")
_ANNOUNCED = re.compile(
    r"\b(?:answer|verdict|conclusion|response)(?: here| to (?:the|this|your) question)?"
    r"(?:\s*(?:is|would be|must be|:|=))+[\s.,:(\[]*(.*)",
    re.S,
)
_SENTENCES = re.compile(r"(?<=[.!?;])\s+|(?<=[a-z])[.!;](?=[a-z])")
_CLAUSES = re.compile(
    r",?\s+(?:but|although|though|while|whereas|however|yet)\s+|[,:;]\s+|"
    r"\s+and\s+(?=(?:a|an|the|there|it|its|no|another|they|he|she|i)\b)|\s+(?:because|since|so)\s+"
)
_SAYING = re.compile(
    r"\b(?:i(?: would|'d)? (?:say|think|answer|guess|believe|go with)|(?:it|that)(?:'s| is) an?)[,:]? (?P<word>yes|no)$"
)
_HEDGES = re.compile(
    r"(?:\bnot|n't)(?: \w+)? (?:sure|clear|certain|possible|know|tell|say|determined?|enough|able)\b|"
    r"\bcannot(?: be)? (?:tell|say|know|determined?|confirm(?:ed)?|answer(?:ed)?)\b|"
    r"\b(?:might|may|maybe|perhaps|possibly|probably|likely|unlikely|if|whether|unclear|unsure|unknown|uncertain|"
    r"hard|difficult|impossible|unable|insufficient|would|should)\b"
)
_DENIALS = re.compile(r"\b(?:not|never|no|neither|nor|none|nothing|nobody|without|cannot)\b|n't\b|\black(?:s|ing)?\b")
_DETERMINERS = {"no", "neither", "nor", "without"}  # several of them deny once: "neither seen nor heard"
_NO_DENIALS = re.compile(r"\b(?:not only|no doubt|without (?:a )?doubt)\b")
_THINGS = r"(?:it|they|that|this|these|those|he|she)"  # pronouns that stand for what is asked about
_PRONOUNS = rf"(?:{_THINGS}|there|i|we)"
_BARE = re.compile(
    rf"^{_PRONOUNS}(?:(?:'s|'re| is| are| was| were| does| do| did| can| could| has| have)(?: not|n't)?| cannot| can't)"
    r"(?: indeed| certainly| definitely| really)?$"
)
_THINK_SO = re.compile(
    r"^i (?P<denied>do not |don't )?(?:do )?(?:think|believe|guess|suppose) (?:so|(?P<not>not))$|"
    r"^i'm afraid (?P<afraid>not)$"
)
_RIGHT = re.compile(
    r"^(?:it|that|this|the (?:statement|claim))(?:'s| is) (?P<denied>not )?(?:(?P<yes>true|right|correct|the case)|"
    r"false|wrong|incorrect)$"
)
# A thing denied altogether.
_NO_THING = re.compile(
    rf"^(?:there (?:is|are|was|were) |there's |(?:i|we|you) (?:can |could )?(?:see|hear|notice|find|detect) )?"
    rf"(?:no|none|nothing|neither)\b(?! (?:{NO_ANSWER}|other)\b)"
    rf"|^there(?:'s not| is not| are not| isn't| aren't| was not| wasn't| weren't)\b"
)

# Words that say the same here, by the word that stands for them.
_SEEN, _HEARD, _MATCH = "<seen>", "<heard>", "<match>"
_ALIKE = {
    **dict.fromkeys(
        "visible visibly seen see sees saw shown show shows showed present appear appears appearing".split(), _SEEN
    ),
    **dict.fromkeys("sound sounds sounding heard hear hears audible audibly noise noises".split(), _HEARD),
    **dict.fromkeys(
        "match matches matching matched consistent correspond corresponds corresponding aligned align".split(), _MATCH
    ),
}
_PREDICATES = {_SEEN, _HEARD, _MATCH}
# Words that deny by themselves, said in other words.
_ANTONYMS = [
    (re.compile(r"\binvisible\b"), "not visible"),
    (re.compile(r"\bno (?:differences?|mismatch|contradictions?)\b"), "match"),
    (re.compile(r"\b(?:silent|inaudible|mute|soundless)\b"), "not sound"),
    (re.compile(r"\b(?:absent|missing)\b"), "not present"),
    (re.compile(r"\b(?:mismatch(?:ed|ing)?|inconsistent|unrelated|misaligned)\b"), "not match"),
    (re.compile(r"\b(?:do|does|did) (?:not |n't )?differ\b|\b(?:are|is) different\b"), "not match"),
]
_PLACES = (
    (re.compile(r"\bin (?:the|this) (?:video|picture|frame|frames|scene|image|footage|visuals?)\b"), _SEEN),
    (re.compile(r"\bin (?:the|this) (?:audio|soundtrack|recording)\b"), _HEARD),
)
_LITTLE = frozenset(
    "a an the this that these those is are was were be been being am do does did can could has have had of in on at to "
    "and or any some it its they them he she his her their there here i we you me one us with by from for as than then "
    "video audio clip visual visuals visually scene image frame footage recording soundtrack picture track context "
    "contexts content contents both also really actually clearly indeed certainly definitely just only very making "
    "make makes made producing produce produces emitting not no never neither nor none nothing nobody without cannot "
    "lacks lack lacking so such yes answer what which who whose all each other every currently".split()
)
# "The man with the dog" is not about the dog; "the sound of the dog" is.
_ATTACHED = re.compile(
    r"\b(?:with|near|beside|behind|by|from|to|over|like|than|of)\s+(?:a|an|the|his|her|its|their)?\s*(?:\w+\s)?$"
)
_SOUND_OF = re.compile(
    r"\b(?:sounds?|noises?|voice|evidence|signs?|presence|view|shot|picture|image|\w+ing)\s+(?:of|from|by)\s+"
    r"(?:a|an|the|some)?\s*(?:\w+\s)?$"
)
_MOST_EXTRAS = 3  # words of a clause that the question does not have


def parse_yes_no(text: str, question: str = "") -> str | None:
    """``"yes"``, ``"no"`` or None.

    The word itself counts at the start of a sentence, or after what announces an answer. Without it a sentence counts
    that affirms or denies what ``question`` asks: it names the same things in the same order, or a pronoun for them
    ("It is not"). "No dog is visible" and "There is no dog" are denials by their form. Contradictions are None.
    """
    said = plain(text)
    sentences = [s.strip() for s in _SENTENCES.split(said) if s and s.strip() and not s.strip().endswith("?")]
    asked = _asked(question)
    words = {verdict for number, sentence in enumerate(sentences) if (verdict := _word(sentence, first=number == 0))}
    words |= {verdict for sentence in sentences if (verdict := _announced(sentence))}
    words |= {clause for sentence in sentences for clause in _clauses(sentence) if clause in (YES, NO)}
    if len(words) > 1:
        return None
    stated = {
        verdict
        for sentence in sentences
        for clause in _clauses(sentence)
        if (verdict := _statement(clause, asked, strictly=bool(words)))
    }
    verdicts = words | stated
    return verdicts.pop() if len(verdicts) == 1 else None


def asks_yes_or_no(question: str) -> bool:
    """Whether the question can be answered by yes or no, by its first word."""
    return re.match(r"(?:is|are|was|were|do|does|did|can|could|has|have|will)\b", question.strip().lower()) is not None


def _word(sentence: str, *, first: bool) -> str | None:
    """The verdict of a word at the start of a sentence; behind the first one it must stand by itself."""
    match = _WORD.match(sentence)
    if not match:
        return None
    rest = sentence[match.end() :].lstrip(' )]"')
    if re.match(r"(?:/|,? ?(?:and|or) )(?:yes|no)\b", rest):
        return None  # "yes or no" repeats the question, "yes and no" does not answer it
    verdict = NO if match["no"] else YES
    alone = not rest or not rest[0].isalnum()
    if alone:
        return verdict
    if match[0] in ("yes", "no") and first:
        follows = re.match(rf"(?:{_SUBJECTS})\b", rest)
        return verdict if verdict == YES or follows else None
    return None


def _announced(sentence: str) -> str | None:
    if match := _SAYING.search(sentence.rstrip(" .!")):
        return match["word"]
    match = _ANNOUNCED.search(sentence)
    return _word(match[1].strip(), first=True) if match else None


def _clauses(sentence: str) -> list[str]:
    """What a sentence says, in parts, without the yes or no before it."""
    sentence = sentence.rstrip(" .!")
    if _word(sentence, first=True) and (match := _WORD.match(sentence)):
        sentence = sentence[match.end() :].lstrip(" ,.:;-!)")
    return [clause.strip() for clause in _CLAUSES.split(sentence) if clause.strip()]


def _statement(clause: str, asked: list[str], *, strictly: bool) -> str | None:
    """What a clause says about the question. ``strictly``: beside an explicit word only what names the question's own
    things can contradict it: "No, it is there but silent" is no."""
    if not strictly:
        if match := _THINK_SO.match(clause):
            return NO if match["denied"] or match["not"] or match["afraid"] else YES
        if match := _RIGHT.match(clause):
            return YES if bool(match["yes"]) != bool(match["denied"]) else NO
    if _HEDGES.search(clause):
        return None
    clause = _NO_DENIALS.sub(" ", clause)
    for pattern, words in _ANTONYMS:
        clause = pattern.sub(words, clause)
    denials = _DENIALS.findall(clause)
    if len(denials) > 1 and not _DETERMINERS >= set(denials):
        return None
    verdict = NO if denials else YES
    content = _content(clause)
    subjects, predicates = [w for w in asked if w not in _PREDICATES], _PREDICATES & set(asked)
    nouns = [word for word in content if word not in _PREDICATES]
    if denials and _NO_THING.match(clause) and (not strictly or _PREDICATES & set(content) <= predicates):
        # Denied altogether, whatever it would do; "no cat" says nothing about a dog.
        if not subjects:
            return NO if (not asked and not strictly) or predicates & set(content) else None
        return NO if not nouns or subjects[0] in nouns else None
    if not strictly:
        if _BARE.match(clause):
            return verdict
        if content and not nouns and (set(content) == predicates or not asked):
            # "Not visible.", "They match."
            if len(clause.split()) <= 2 or re.match(rf"{_THINGS}\b", clause):
                return verdict
        if re.match(rf"{_THINGS}\b", clause):
            content = [*subjects, *content]
    if not asked or not _says(clause, content, asked, subjects):
        return None
    return verdict


def _says(clause: str, content: list[str], asked: list[str], subjects: list[str]) -> bool:
    """Whether a clause is about what is asked: the same things, in the same order, and little else."""
    if not set(asked) <= set(content):
        return False
    if [word for word in content if word in subjects][: len(subjects)] != subjects:
        return False
    if len([word for word in content if word not in asked and word not in _PREDICATES]) > _MOST_EXTRAS:
        return False
    if not subjects:
        return True
    first = next((m for m in re.finditer(r"[^\W_]+", clause) if _stem(m[0]) == subjects[0]), None)
    if first is None:
        return True  # a pronoun stands for it
    before = clause[: first.start()]
    # "The man with the dog" is not about the dog; "the sound of the dog" is.
    return not _ATTACHED.search(before) or _SOUND_OF.search(before) is not None


def _asked(question: str) -> list[str]:
    """What a question asks: its content, without what tells how to answer and what is only compared with."""
    question = re.sub(r"\b(?:please )?(?:answer|reply|respond)\b.*", "", question.lower(), flags=re.S)
    existence = re.match(r"(?:is|are|was|were) there\b", question.strip())
    words = _words(re.sub(r"\bthan\b.*", "", question))
    if existence and not _PREDICATES & set(words):
        words.append(next((word for pattern, word in _PLACES if pattern.search(question)), _SEEN))
    return words


def _content(clause: str) -> list[str]:
    """What a clause says. "There is" and "in the video" say that something is to be seen."""
    words = _words(clause)
    if not _PREDICATES & set(words):
        words += [word for pattern, word in _PLACES if pattern.search(clause)][:1]
        if clause.startswith("there ") and not _PREDICATES & set(words):
            words.append(_SEEN)
    return words


def _words(text: str) -> list[str]:
    """The words that carry the meaning, in their order, each once: stems, and one word for those that say the same."""
    words = re.findall(r"[^\W_]{2,}", text.replace("n't", " not").replace("'s", " "))
    return list(dict.fromkeys(_stem(word) for word in words if word not in _LITTLE))


def _stem(word: str) -> str:
    if word in _ALIKE:
        return _ALIKE[word]
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]  # running, run
    return word.rstrip("e") if len(word) > 3 else word
