"""Other prompts than the caller's: without one modality, or with a question appended; and how decoding goes on from
them.

A modality that is dropped is absent from the prompt: its placeholders, its markers and its features go, and the model
gives the rest the positions of a prompt that never had them.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fmd_ext.adapters import AUDIO, JOINT, LABELS, TEXT, VISUAL, Adapter, find_adapter
from fmd_ext.inputs.chat import render_question

# What comes with an argument that holds features.
COMPANIONS = {
    "pixel_values": ("image_grid_thw",),
    "pixel_values_videos": ("video_grid_thw", "video_second_per_grid", "second_per_grid_ts"),
    "input_features": ("feature_attention_mask", "sound_order"),
}
# Inputs whose rows are the patches of all clips, by a grid [clips, 3] of patches.
GRIDS = {"pixel_values_videos": "video_grid_thw", "pixel_values": "image_grid_thw"}
# Config attribute with the id of the token in front of a clip; what ends the clip mirrors what begins it.
STARTS = {VISUAL: "vision_start_token_id", AUDIO: "audio_start_token_id"}
COUNTED = ("input_ids", "attention_mask", "position_ids", "cache_position")


class Prompt:
    """A prompt that was run in the place of the caller's. Later calls go on from its own mask and positions.

    Args:
        call: the arguments of forward, with input_ids and attention_mask [batch, length].
        width: positions of the caller's prompt.

    Attributes:
        next: int64 [..., batch, 1], the position of the next token, as the decoder counts.
    """

    def __init__(self, call: dict[str, Any], width: int) -> None:
        self.mask: Tensor = call["attention_mask"]
        self.width = width
        self.next: Tensor = torch.full_like(self.mask[:, :1], self.mask.shape[1])

    @contextlib.contextmanager
    def running(self, decoder: nn.Module) -> Iterator[None]:
        """Around the prompt's forward call: notes the positions that the model gives its tokens."""

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (positions := kwargs.get("position_ids")) is not None:
                batch = len(self.mask)
                self.next = (positions[..., -1:] + 1).expand(*positions.shape[:-2], batch, 1)

        hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def later(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a later call of the caller's, for this prompt."""
        new = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        given = call.get("attention_mask")
        seen = self.mask.new_ones(new.shape[:2]) if given is None else given[:, -new.shape[1] :].to(self.mask)
        self.mask = torch.cat([self.mask, seen], 1)
        positions = self.next + (seen.cumsum(1) - 1).clamp(min=0)
        self.next = self.next + seen.sum(1, keepdim=True)
        own = {name: value for name, value in call.items() if name != "cache_position"}
        return {**own, "attention_mask": self.mask, "position_ids": positions}

    @property
    def rope_deltas(self) -> Tensor:
        """int64 [batch, 1]: what models with M-RoPE keep of a prompt: the next position less the caller's width."""
        return self.next.reshape(-1, *self.next.shape[-2:]).amax(0) - self.width


def joined(parts: Sequence[tuple[Sequence[int], Prompt, DynamicCache]], width: int, cache: Any) -> tuple[Prompt, Any]:
    """Prompts of parts of a batch as one, in ``cache``, whose length becomes ``width`` as the caller expects.

    The keys and values of a shorter prompt stand at the end; nobody attends to what is in front of them.
    """
    order = torch.tensor([row for rows, *_ in parts for row in rows]).argsort()
    whole = Prompt({"attention_mask": _stacked([p.mask for _, p, _ in parts], width, order)}, width)
    whole.next = torch.cat([prompt.next for _, prompt, _ in parts], dim=-2)[..., order, :]
    for index in range(len(parts[0][2].layers)):
        layers = [own.layers[index] for *_, own in parts]
        keys, values = (_stacked([getattr(layer, name) for layer in layers], width, order, dim=-2)
                        for name in ("keys", "values"))  # fmt: skip
        cache.update(keys, values, index)
    return whole, cache


def _stacked(tensors: Sequence[Tensor], width: int, order: Tensor, dim: int = 1) -> Tensor:
    """One batch of all tensors' samples, each with zeros in front up to ``width`` in ``dim``."""
    padded = []
    for tensor in tensors:
        shape = list(tensor.shape)
        shape[dim] = width - shape[dim]
        padded.append(torch.cat([tensor.new_zeros(shape), tensor], dim))
    return torch.cat(padded)[order.to(padded[0].device)]


def refuse_joint(labels: Tensor, name: str) -> None:
    """Raises ValueError for joint positions, from which neither modality can be taken."""
    if (labels == JOINT).any():
        raise ValueError(
            f"{name} tells video positions from audio positions, and the sample has joint ones (label 3), which mix "
            "both modalities; it takes models with separate tokens for each"
        )


def has_both(labels: Tensor) -> Tensor:
    """bool [batch]: samples with video and audio, of labels [batch, length]."""
    return (labels == VISUAL).any(-1) & (labels == AUDIO).any(-1)


def without(
    model: nn.Module, call: dict[str, Any], modalities: Collection[int], rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """The arguments of the same prompt, padded on the left, from which ``modalities`` (labels) are absent.

    Args:
        call: of forward, at a prompt.
        rows: samples of the batch that are taken; None: all.

    Raises:
        TypeError: a model whose features this module knows nothing of.
        ValueError: features that are encoded already, or that do not belong to the placeholders.
    """
    adapter = find_adapter(model)
    config = adapter.find_entry(model).config
    ids = call["input_ids"]
    mask = call.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    labels = adapter.labels_of(model, ids, call)
    rows = range(len(ids)) if rows is None else rows
    _check_features(adapter, call)
    starts = {label: getattr(config, name, None) for label, name in STARTS.items()}
    dropped = torch.isin(labels, torch.tensor(list(modalities), dtype=labels.dtype, device=labels.device))
    for row in rows:
        for at in _markers(ids[row].tolist(), labels[row].tolist(), starts, modalities):
            dropped[row, at] = True
    kept = (mask != 0) & ~dropped
    pad = getattr(config, "pad_token_id", None) or 0
    own = _with_positions(call, _gathered({"input_ids": ids, **_per_token(call)}, kept, rows, pad))
    _take_features(adapter, config, call, own, modalities, list(rows))
    if modalities and own.get("use_audio_in_video"):
        own["use_audio_in_video"] = False  # one modality alone has nothing to interleave with
    return own


def _per_token(call: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments [batch, length] other than ids, mask and positions."""
    features = {*COMPANIONS, *itertools.chain(*COMPANIONS.values()), *COUNTED}
    shape = call["input_ids"].shape
    return {n: v for n, v in call.items() if n not in features and isinstance(v, Tensor) and v.shape == shape}


def _with_positions(call: dict[str, Any], tokens: dict[str, Tensor]) -> dict[str, Any]:
    """``call`` with other ``tokens``. Positions of M-RoPE are left to the model: they follow from ids and clips."""
    own = {name: value for name, value in call.items() if name not in COUNTED} | tokens
    if (given := call.get("position_ids")) is not None and given.dim() == 2:
        own["position_ids"] = (own["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return own


def _check_features(adapter: Adapter, call: dict[str, Any]) -> None:
    if call.get("mm_encoder_outputs"):
        raise ValueError("to drop a modality, give its pixels and sound, not mm_encoder_outputs")
    for source in adapter.sources:
        for name in source.inputs:
            if "." not in name and call.get(name) is not None and name not in COMPANIONS:
                raise TypeError(
                    f"{adapter.name}: it is not known which clip {name!r} belongs to, so none can be dropped"
                )


def _markers(
    ids: list[int], labels: list[int], starts: dict[int, int | None], modalities: Collection[int]
) -> Iterator[int]:
    """Places of the tokens that begin and end the clips of ``modalities`` in one prompt."""
    for at, token in enumerate(ids):
        label = next((label for label, start in starts.items() if start == token), None)
        if label not in modalities:
            continue
        # Interleaved sound: its markers stand within those of the video.
        inner = label == VISUAL and at + 1 < len(ids) and ids[at + 1] == starts[AUDIO]
        body = at + 1 + inner
        end = next((place for place in range(body, len(ids)) if labels[place] == TEXT), len(ids)) + inner
        if body < end < len(ids):
            yield from (at, end)


def _gathered(tensors: dict[str, Tensor], kept: Tensor, rows: Sequence[int], pad: int) -> dict[str, Tensor]:
    """``tensors`` [batch, length] at the ``kept`` positions of ``rows``, padded on the left; and their mask."""
    width = int(kept[list(rows)].sum(1).max())
    out = {name: t.new_full((len(rows), width), pad if name == "input_ids" else 0) for name, t in tensors.items()}
    mask = torch.zeros(len(rows), width, dtype=torch.long, device=kept.device)
    for place, row in enumerate(rows):
        count = int(kept[row].sum())
        mask[place, width - count :] = 1
        for name, tensor in tensors.items():
            out[name][place, width - count :] = tensor[row, kept[row]]
    return {**out, "attention_mask": mask}


def _take_features(
    adapter: Adapter,
    config: Any,
    call: dict[str, Any],
    own: dict[str, Any],
    modalities: Collection[int],
    rows: list[int],
) -> None:
    """Leaves in ``own`` the features of the samples ``rows``, without ``modalities``."""
    batch = len(call["input_ids"])
    for source in adapter.sources:
        name = next((n for n in source.inputs if call.get(n) is not None), None)
        if name is None:
            continue
        belonging = [name, *(c for c in COMPANIONS[name] if call.get(c) is not None)]
        if LABELS[source.modality] in modalities:
            for argument in belonging:
                own[argument] = None
            continue
        if rows == list(range(batch)):
            continue
        grid = call.get(GRIDS.get(name, ""))
        if grid is None and "feature_attention_mask" not in belonging:
            for argument in belonging:  # [batch, clips of the sample, ...]
                own[argument] = call[argument][rows]
            continue
        token = operator.attrgetter(source.token_id)(config)
        if grid is None:
            clips = (call["input_ids"] == getattr(config, STARTS[AUDIO])).sum(1).tolist()
        else:
            clips = _clips_by_grid(grid, (call["input_ids"] == token).sum(1).tolist(), config)
        if sum(clips) != len(call[belonging[1]]):
            raise ValueError(f"{name} holds {len(call[belonging[1]])} clips, and the prompts have {sum(clips)}")
        ends = list(itertools.accumulate(clips))
        taken = [clip for row in rows for clip in range(ends[row] - clips[row], ends[row])]
        for argument in belonging:
            if not taken:
                own[argument] = None
            elif argument == name and grid is not None:
                pieces = call[name].split(grid.prod(-1).tolist())
                own[name] = torch.cat([pieces[clip] for clip in taken])
            elif isinstance(call[argument], Tensor):
                own[argument] = call[argument][taken]
            else:
                own[argument] = [call[argument][clip] for clip in taken]


def _clips_by_grid(grid: Tensor, tokens: Sequence[int], config: Any) -> list[int]:
    """Clips of each sample, from the placeholders that it has: ``tokens`` [batch]."""
    sizes = (grid.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()
    counts, at = [], 0
    for wanted in tokens:
        first = at
        while wanted > 0 and at < len(sizes):
            wanted -= sizes[at]
            at += 1
        if wanted:
            raise ValueError("the grids do not belong to the placeholders of the prompts")
        counts.append(at - first)
    return counts


def closing_ids(processor: Any) -> list[int]:
    """Token ids of what the processor's template puts behind the question: the end of the turn, and the opening of
    the answer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    one, other = (tokenizer(render_question(processor, question), add_special_tokens=False)["input_ids"][::-1]
                  for question in ("a", "?"))  # fmt: skip
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in same][::-1]


def with_question(call: dict[str, Any], question: Sequence[int], closing: Sequence[int]) -> dict[str, Any]:
    """The arguments of the same prompt with the tokens ``question`` behind the user's text, before ``closing``.

    Raises ValueError where a prompt does not end with ``closing``.
    """
    ids = call["input_ids"]
    place = ids.shape[1] - len(closing)
    mask = call.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if place < 1 or not (ids[:, place:] == ids.new_tensor(closing)).all() or not mask[:, place:].all():
        raise ValueError(
            "a prompt does not end as the processor's chat template ends a question, so nothing can be asked behind "
            "it; build it with this processor and pad on the left"
        )
    added = ids.new_tensor(question).expand(len(ids), -1)

    def longer(value: Tensor, new: Tensor) -> Tensor:
        return torch.cat([value[:, :place], new.to(value), value[:, place:]], 1)

    tokens = {name: longer(value, torch.zeros_like(added)) for name, value in _per_token(call).items()}
    tokens |= {"input_ids": longer(ids, added), "attention_mask": longer(mask, torch.ones_like(added))}
    return _with_positions(call, tokens)
