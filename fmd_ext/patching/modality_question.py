"""What the model is asked about a user's question: which modality its answer needs. One wording per language."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fmd_ext.engine.routes import NEEDS


@dataclasses.dataclass(frozen=True)
class ModalityQuestion:
    """A wording.

    Args:
        text: what the model is asked, with ``{question}`` where the user's question goes.
        answers: for each of NEEDS the spellings of that answer. Their first tokens are compared, so that no two of
            NEEDS may begin alike.

    Raises:
        ValueError: no ``{question}`` in the text, or other keys than NEEDS, or an answer without a spelling.
    """

    text: str
    answers: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if "{question}" not in self.text:
            raise ValueError(f"the text must hold {{question}}, where the user's question goes; got {self.text!r}")
        if set(self.answers) != set(NEEDS) or not all(self.answers.values()):
            raise ValueError(f"answers must give spellings for {', '.join(NEEDS)}; got {dict(self.answers)}")

    def about(self, question: str) -> str:
        """The text to ask about ``question``."""
        return self.text.replace("{question}", question)


MODALITY_QUESTIONS: dict[str, ModalityQuestion] = {
    "en": ModalityQuestion(
        "{question}\nWhat is needed to answer this: the video, the audio, or both? Answer with one word.",
        {"visual": ("video", "Video"), "audio": ("audio", "Audio"), "both": ("both", "Both")},
    ),
    "zh": ModalityQuestion(
        "{question}\n回答这个问题需要什么：画面、声音，还是两者？请只回答一个词。",
        {"visual": ("画面", "视频"), "audio": ("声音", "音频"), "both": ("两者", "都")},
    ),
}
