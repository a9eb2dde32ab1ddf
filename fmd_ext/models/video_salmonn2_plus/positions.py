"""M-RoPE positions of video-SALMONN 2+: of its released inference, and of its training.

Both count text as Qwen2.5-VL does. They differ in a clip with sound, whose tokens stand between those of the frames:

``"inference"``
    What the released code computes when it generates (and what the authors' own test script runs): it is told neither
    the sounds' lengths nor how much time lies between frames. As many tokens as the picture has, counted from the
    first one of the clip, get the places (time, height, width) of the picture's grid in order, whether they are
    picture or sound, two steps of time per pair of frames. What is left of the clip counts as text.
``"training"``
    The picture's tokens get the places of their grid, two steps of time per second; those of the sound, two of which
    make a second, get (time, 0, time), from the same start. What follows starts one after the last time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

SCHEMES = ("inference", "training")
STEPS_PER_SECOND = 2  # of the first dimension


@dataclasses.dataclass(frozen=True)
class ClipTokens:
    """The ids that stand for clips in a prompt, and the one in front of each clip."""

    image: int
    video: int
    audio: int
    start: int


def mrope_positions(
    ids: torch.Tensor,
    tokens: ClipTokens,
    scheme: str,
    image_grids: Iterator[torch.Tensor],
    video_grids: Iterator[torch.Tensor],
    seconds_per_grid: Iterator[float],
    merge_size: int,
) -> torch.Tensor:
    """Positions [3, length] (time, height, width) of a prompt ``ids`` [length] without padding, int64 on the CPU.

    Args:
        scheme: one of ``SCHEMES``.
        image_grids, video_grids: patches in time, height and width [3] of the images and videos to come; those of this
            prompt are taken.
        seconds_per_grid: of the videos to come, seconds between a pair of frames and the next; taken with
            ``"training"`` only.
        merge_size: patches per side of a token.

    Raises:
        ValueError: fewer grids than the prompt has images and videos, or grids of more tokens than it has.
    """
    row = ids.tolist()
    timed = scheme == "training"
    kinds = [tokens.image, tokens.video] + [tokens.audio] * timed
    heard = timed and tokens.audio in row
    clips = sum(id == tokens.start and after in kinds for id, after in zip(row, row[1:], strict=False))
    pieces: list[torch.Tensor] = []
    begin = offset = 0
    for _ in range(clips):
        at = next((i for i in range(begin, len(row)) if row[i] in kinds), len(row))
        pieces.append(_text(at - begin, offset))
        offset += at - begin
        kind = row[at] if at < len(row) else None
        if timed and kind in (tokens.video, tokens.audio):
            end = next((i for i in range(at, len(row)) if row[i] not in (tokens.video, tokens.audio)), len(row))
            piece = _clip_in_time(ids[at:end].cpu(), tokens, video_grids, seconds_per_grid, merge_size)
        else:
            # One second between pairs of frames; an image has no time.
            grids, seconds = (image_grids, 0) if kind == tokens.image else (video_grids, 1)
            piece = _grid(_next(grids), seconds, merge_size)
        pieces.append(piece + offset)
        begin, offset = at + piece.shape[1], int(pieces[-1].max()) + 1
    if begin > len(row):
        raise ValueError(f"the clips' grids hold more tokens than the prompt of {len(row)} has")
    if heard:
        offset = int(pieces[-1][0].max()) + 1
    pieces.append(_text(len(row) - begin, offset))
    return torch.cat(pieces, dim=1)


def _text(length: int, offset: int) -> torch.Tensor:
    return (torch.arange(length) + offset).expand(3, -1)


def _grid(grid: torch.Tensor, seconds: float, merge_size: int) -> torch.Tensor:
    """[3, tokens] of a picture: time in steps, rounded down as in float32; rows and columns of tokens."""
    time, height, width = (int(size) for size in grid)
    steps = (torch.arange(time) * seconds * STEPS_PER_SECOND).long()
    rows, columns = torch.arange(height // merge_size), torch.arange(width // merge_size)
    return torch.stack(torch.meshgrid(steps, rows, columns, indexing="ij")).flatten(1)


def _clip_in_time(
    ids: torch.Tensor,
    tokens: ClipTokens,
    video_grids: Iterator[torch.Tensor],
    seconds_per_grid: Iterator[float],
    merge_size: int,
) -> torch.Tensor:
    """[3, tokens] of one clip's tokens: picture with sound in between, or sound alone, counted in time by both."""
    seen, heard = ids == tokens.video, ids == tokens.audio
    times = torch.arange(int(heard.sum()))
    positions = torch.zeros(3, len(ids), dtype=torch.long)
    if not seen.any():
        return torch.stack([times, times, torch.zeros_like(times)])
    picture = _grid(_next(video_grids), _next(seconds_per_grid), merge_size)
    if picture.shape[1] != seen.sum():
        raise ValueError(f"a clip has {int(seen.sum())} tokens of picture, its grid {picture.shape[1]}")
    positions[:, seen] = picture
    positions[:, heard] = torch.stack([times, torch.zeros_like(times), times])
    return positions


def _next(iterator: Iterator) -> torch.Tensor | float:
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            "the prompt has more images and videos than there are grids and times between frames"
        ) from None
