"""Clips with tracks that end, begin or are as they like: Matroska with grey frames and constant sound."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

RATE, SAMPLES = 5, 8000  # frames and samples per second


def grey(index: int) -> int:
    """Brightness of the frame with this number."""
    return 10 + 20 * (index % 12)


def write_tracks(
    path: Path,
    *,
    frames: int | None = 20,
    sounds: Sequence[Sequence[float]] = ((0.0,),),
    channels: int = 1,
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
) -> Path:
    """A file with a picture of so many frames (None: no such track) and a track for each of ``sounds``.

    A track of sound has a piece of one second at each of the given seconds (none: an empty track). Its samples are
    0.1 in the first track, 0.2 in the second, and so on; in the first channel only.
    """
    with av.open(str(path), "w") as out:
        video = None if frames is None else out.add_stream(codec, rate=RATE, options=options or {})
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        tracks = [out.add_stream("pcm_f32le", rate=SAMPLES, layout=layout) for _ in sounds]
        out.start_encoding() if not frames and not any(sounds) else None
        if video is not None:
            video.width = video.height = 64
            video.pix_fmt = "yuv420p"
            for index in range(frames):
                image = np.full((64, 64, 3), grey(index), np.uint8)
                out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(video.encode(None))
        for number, (track, starts) in enumerate(zip(tracks, sounds, strict=True), start=1):
            for start in starts:
                samples = np.zeros((1, SAMPLES * channels), np.float32)
                samples[:, ::channels] = 0.1 * number
                piece = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
                piece.sample_rate, piece.pts = SAMPLES, round(start * SAMPLES)
                out.mux(track.encode(piece))
            out.mux(track.encode(None)) if starts else None
    return path


def claim_seconds(path: Path, seconds: float) -> None:
    """Makes a Matroska file say that it lasts so long."""
    content = bytearray(path.read_bytes())
    at = content.find(b"\x44\x89\x88") + 3  # the Duration element: a double, in milliseconds
    content[at : at + 8] = struct.pack(">d", 1000.0 * seconds)
    path.write_bytes(content)


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Replaces all of ``old``, which must be there, by as many bytes."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
