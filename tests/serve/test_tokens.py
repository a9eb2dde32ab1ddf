"""Reserved ids: from placeholders and back, and the labels between."""

from __future__ import annotations

import torch

from fmd_ext.lab.tiny import TOKEN_IDS, tiny_thinker_config
from fmd_ext.serve.tokens import ReservedIds, swap

CONFIG = tiny_thinker_config(vocab_size=300)
IMAGE, VIDEO, AUDIO = (TOKEN_IDS[f"{kind}_token"] for kind in ("image", "video", "audio"))
IDS = [1, 200, IMAGE, IMAGE, 3, VIDEO, AUDIO, 296, 0]


def test_there_and_back():
    swapped = swap(IDS, CONFIG)
    assert swapped == [1, 200, 297, 297, 3, 298, 299, 296, 0]
    for dtype in (torch.int32, torch.int64):
        assert ReservedIds(CONFIG).restore(torch.tensor(swapped, dtype=dtype)).tolist() == IDS


def test_labels_are_those_of_reserved_ids_alone():
    reserved = ReservedIds(CONFIG)
    visual, audio = reserved.labels(torch.tensor(swap(IDS, CONFIG)))
    assert visual.tolist() == [token in (IMAGE, VIDEO) for token in IDS]
    assert audio.tolist() == [token == AUDIO for token in IDS]
    visual, audio = reserved.labels(torch.tensor(IDS))
    assert not visual.any() and not audio.any()


def test_reserved_ids_have_no_logits():
    logits = ReservedIds(CONFIG).forbid(torch.zeros(2, 300))
    assert logits[:, :297].abs().max() == 0 and (logits[:, 297:] == float("-inf")).all()
