"""Many questions about one clip in one sequence: the clip once, then the questions, which do not see each other.

A question's logits are those of a conversation about the clip with this question alone: same tokens, same positions,
and a mask that hides the other questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.adapters import find_adapter
from fmd_ext.engine.reference import decoder_inputs
from fmd_ext.inputs.chat import last_question_token, prepare_inputs
from fmd_ext.inputs.media import Clip


@dataclasses.dataclass(frozen=True)
class Opening:
    """What stands before the question in every prompt of one sort (with picture, with sound, with both).

    Args:
        ids: int64 [length].
        positions: int64 [3, length], of M-RoPE.
        labels: int64 [length]: 0 text, 1 visual, 2 audio.
        closing: token ids between the question and its answer.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    closing: list[int]


@torch.no_grad()
def opening_of(model: nn.Module, processor: Any, clip: Clip | None) -> Opening:
    """The opening of prompts about clips like ``clip``: with as many frames of the same size, and as much sound.

    None: of prompts without a clip.
    """
    inputs = prepare_inputs(processor, [] if clip is None else clip, "?")
    given = decoder_inputs(model, **inputs)
    ids, labels = inputs["input_ids"][0], given["labels"][0]
    positions = given["position_ids"]
    length = len(ids) + last_question_token(processor, "?")
    return Opening(ids[:length], positions[-3:, 0, :length], labels[:length], ids[length + 1 :].tolist())


@dataclasses.dataclass(frozen=True)
class Packed:
    """Questions behind openings of one sort, for a batch of clips.

    Args:
        ids: int64 [clips, text length]: questions, closings and answers; padded with 0.
        positions: int64 [3, clips, text length].
        mask: bool [clips, 1, length, length] with length = opening + text length: who sees whom.
        targets: int64 [clips, text length]: the token that comes next where it is one of an answer, else -100.
        weights: float32 [clips, text length]: 1 / sqrt(answer's length) at targets, else 0.
        places: per clip and question the index in the text at which the first token of the answer is predicted.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    places: list[list[int]]


def pack(opening: Opening, clips: Sequence[Sequence[tuple[list[int], list[int]]]]) -> Packed:
    """``clips``: per clip its questions as token ids, each with the ids of its answer (empty: only asked)."""
    texts = [[(question + opening.closing, answer) for question, answer in clip] for clip in clips]
    length = max(sum(len(prompt) + len(answer) for prompt, answer in clip) for clip in texts)
    shape = (len(texts), length)
    ids, targets = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    own, offset = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    places: list[list[int]] = []
    for row, clip in enumerate(texts):
        start, found = 0, []
        for number, (prompt, answer) in enumerate(clip):
            end, first = start + len(prompt) + len(answer), start + len(prompt) - 1
            ids[row, start:end] = prompt + answer
            own[row, start:end], offset[row, start:end] = number, np.arange(end - start)
            targets[row, first : first + len(answer)] = answer
            weights[row, first : first + len(answer)] = max(1, len(answer)) ** -0.5
            found.append(first)
            start = end
        places.append(found)

    before = len(opening.ids)
    same = own[:, :, None] == own[:, None, :]
    mask = np.zeros((len(texts), before + length, before + length), bool)
    mask[:, :, :before] = True
    mask[:, before:, before:] = same
    mask &= np.tri(before + length, dtype=bool)
    positions = int(opening.positions.max()) + 1 + torch.from_numpy(offset)
    return Packed(
        torch.from_numpy(ids),
        positions.expand(3, *shape),
        torch.from_numpy(mask)[:, None],
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        places,
    )


def embed_opening(
    model: nn.Module, opening: Opening, video: torch.Tensor | None, audio: torch.Tensor | None
) -> torch.Tensor:
    """[clips, length, hidden] from the encoders' output [clips * tokens, hidden] of pictures and sounds.

    Without either the one opening is that of every sample: [1, length, hidden].
    """
    table = find_adapter(model).find_decoder(model).get_input_embeddings()
    embeds = table(opening.ids)
    given = [(label, features) for label, features in ((1, video), (2, audio)) if features is not None]
    clips = len(given[0][1]) // int((opening.labels == given[0][0]).sum()) if given else 1
    embeds = embeds.expand(clips, *embeds.shape).clone()
    for label, features in given:
        embeds[:, opening.labels == label] = features.view(clips, -1, embeds.shape[-1])
    return embeds


def packed_hidden(model: nn.Module, opening: Opening, opening_embeds: torch.Tensor, packed: Packed) -> torch.Tensor:
    """The decoder's output [clips, text length, hidden] at the text behind openings [clips or 1, length, hidden]."""
    decoder = find_adapter(model).find_decoder(model)
    opening_embeds = opening_embeds.expand(len(packed.ids), -1, -1)
    embeds = torch.cat([opening_embeds, decoder.get_input_embeddings()(packed.ids)], dim=1)
    before = opening.positions[:, None].expand(3, len(embeds), -1)
    out = decoder(
        inputs_embeds=embeds,
        attention_mask={"full_attention": packed.mask},
        position_ids=torch.cat([before, packed.positions], dim=2),
        use_cache=False,
    )
    return out.last_hidden_state[:, len(opening.ids) :]
