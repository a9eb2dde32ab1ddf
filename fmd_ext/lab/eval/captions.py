"""METEOR and CIDEr of captions, by pycocoevalcap: the code that papers on captions use. It needs Java."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def caption_scores(references: Sequence[str], captions: Sequence[str]) -> dict[str, float] | str:
    """Scores over the whole corpus: ``{"METEOR": ..., "CIDEr": ...}``, or why they cannot be computed.

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
    return {
        "METEOR": float(Meteor().compute_score(truth, said)[0]),
        "CIDEr": float(Cider().compute_score(truth, said)[0]),
    }
