"""METEOR and CIDEr of captions, by pycocoevalcap: the code that papers on captions use. It needs Java."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """``corpus``: metric to the score of all captions together; ``items``: metric to float [captions], each one's own.

    CIDEr of the corpus is the mean of the captions' own; METEOR of the corpus is of its summed counts.
    """

    corpus: dict[str, float]
    items: dict[str, np.ndarray]


def caption_scores(references: Sequence[str], captions: Sequence[str]) -> CaptionScores | str:
    """METEOR and CIDEr, or why they cannot be computed.

    CIDEr weighs words by how rare they are among the references at hand: only values on the same items compare.

    Args:
        references: one published caption per item.
        captions: what the model said about the same items.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        return "not computed: needs pycocoevalcap (pip install 'fmd-ext[captions]')"
    if shutil.which("java") is None:
        return "not computed: pycocoevalcap needs Java, and there is no java on the PATH"
    tokenizer = PTBTokenizer()
    truth, said = (
        tokenizer.tokenize({number: [{"caption": text.strip() or "."}] for number, text in enumerate(texts)})
        for texts in (references, captions)
    )
    found = {"METEOR": Meteor().compute_score(truth, said), "CIDEr": Cider().compute_score(truth, said)}
    return CaptionScores(
        {name: float(corpus) for name, (corpus, _) in found.items()},
        {name: np.asarray(items, dtype=float) for name, (_, items) in found.items()},
    )
