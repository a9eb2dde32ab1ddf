"""Inputs of a tiny Qwen2.5-Omni or Qwen3-Omni thinker made from a script of pieces, without a processor.

A sample is a list of pieces: ``("text", n)``, ``("image", (h, w))``, ``("video", (t, h, w))``,
``("audio", mel_frames)``, and ``("both", (t, h, w), mel_frames)`` for a video with its sound interleaved. Grids count
patches, of which 2 x 2 make a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fmd_ext.lab.tiny import TOKEN_IDS

NUM_MEL_BINS = 32
FIRST_WORD = 20


def audio_tokens(mel_frames: int) -> int:
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


def qwen3_audio_tokens(mel_frames: int) -> int:
    """Three convolutions of stride 2 over chunks of 100 mel frames: 13 tokens for a whole chunk."""
    chunks, rest = divmod(mel_frames, 100)
    for _ in range(3):
        rest = (rest + 1) // 2
    return 13 * chunks + rest


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's inputs look like: pixels of a patch's side, tokens of a sound."""

    patch_size: int
    audio_tokens: Callable[[int], int]

    @property
    def patch_values(self) -> int:
        return 3 * 2 * self.patch_size**2  # channels, frames and pixels of one patch


QWEN2_5 = Family(14, audio_tokens)
QWEN3 = Family(16, qwen3_audio_tokens)


def build_inputs(
    samples: list[list[tuple]], seed: int = 0, padding: str = "left", family: Family = QWEN2_5
) -> dict[str, object]:
    """Forward arguments of the thinker for a batch of ``samples``."""
    audio_tokens, patch_values = family.audio_tokens, family.patch_values
    draw = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    images, videos, audios = [], [], []
    interleaved = False
    for sample in samples:
        ids: list[int] = []
        for kind, *sizes in sample:
            if kind == "text":
                ids += torch.randint(FIRST_WORD, 260, (sizes[0],), generator=draw).tolist()
                continue
            if kind == "image":
                images.append((1, *sizes[0]))
                ids += _wrapped("vision", ["image_token"] * (sizes[0][0] * sizes[0][1] // 4))
            elif kind == "video":
                videos.append(sizes[0])
                t, h, w = sizes[0]
                ids += _wrapped("vision", ["video_token"] * (t * h * w // 4))
            elif kind == "audio":
                audios.append(sizes[0])
                ids += _wrapped("audio", ["audio_token"] * audio_tokens(sizes[0]))
            elif kind == "both":
                interleaved = True
                (t, h, w), frames = sizes
                videos.append((t, h, w))
                audios.append(frames)
                ids += _wrapped("vision", [], _wrapped("audio", _interleave(t * h * w // 4, audio_tokens(frames))))
            else:
                raise ValueError(kind)
        rows.append(ids)

    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), TOKEN_IDS["pad_token"])
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, ids in enumerate(rows):
        place = slice(width - len(ids), None) if padding == "left" else slice(0, len(ids))
        input_ids[i, place], mask[i, place] = torch.tensor(ids), 1
    inputs: dict[str, object] = {"input_ids": input_ids, "attention_mask": mask}
    if images:
        inputs["image_grid_thw"] = torch.tensor(images)
        inputs["pixel_values"] = torch.randn(sum(h * w for _, h, w in images), patch_values, generator=draw)
    if videos:
        inputs["video_grid_thw"] = torch.tensor(videos)
        inputs["pixel_values_videos"] = torch.randn(sum(t * h * w for t, h, w in videos), patch_values, generator=draw)
        inputs["video_second_per_grid"] = torch.full((len(videos),), 1.0)
    if audios:
        frames = torch.tensor(audios)
        inputs["input_features"] = torch.randn(len(audios), NUM_MEL_BINS, max(audios), generator=draw)
        inputs["feature_attention_mask"] = (torch.arange(max(audios)) < frames[:, None]).long()
    if interleaved:
        inputs["use_audio_in_video"] = True
    return inputs


def _wrapped(kind: str, names: list[str], ids: list[int] | None = None) -> list[int]:
    inner = [TOKEN_IDS[name] for name in names] if ids is None else ids
    return [TOKEN_IDS[f"{kind}_bos_token"], *inner, TOKEN_IDS[f"{kind}_eos_token"]]


def _interleave(num_video: int, num_audio: int) -> list[str]:
    """Chunks of 3 video and 2 audio tokens in turn, what is left of the longer at the end."""
    names: list[str] = []
    while num_video or num_audio:
        for kind, chunk in (("video", 3), ("audio", 2)):
            count = min(chunk, num_video if kind == "video" else num_audio)
            names += [f"{kind}_token"] * count
            num_video, num_audio = (num_video - count, num_audio) if kind == "video" else (num_video, num_audio - count)
    return names


# Samples that the tests combine: separate and interleaved clips, several clips, one modality, none.
VIDEO_AUDIO = [("text", 5), ("video", (2, 4, 4)), ("audio", 30), ("text", 7)]
AUDIO_VIDEO = [("text", 3), ("audio", 22), ("text", 2), ("video", (1, 4, 8)), ("text", 4)]
TWO_CLIPS = [("text", 2), ("video", (1, 4, 4)), ("audio", 16), ("text", 3)]
TWO_CLIPS += [("video", (2, 4, 4)), ("audio", 24), ("text", 5)]
WITH_IMAGE = [("text", 4), ("image", (4, 4)), ("text", 2), ("audio", 20), ("text", 3)]
INTERLEAVED = [("text", 6), ("both", (3, 4, 4), 36), ("text", 5)]
VIDEO_ONLY = [("text", 4), ("video", (2, 4, 4)), ("text", 6)]
AUDIO_ONLY = [("text", 4), ("audio", 26), ("text", 3)]
TEXT_ONLY = [("text", 12)]
