"""Writes short real clips: a coloured disc that moves over a gradient, and a pulsing tone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAME_RATE = 25
FAST = {"aac_coder": "fast"}  # FFmpeg's default searches ten times as long
AUDIO_RATE = 44100  # on purpose not the rate that models take: reading must resample


def write_clip(
    path: str | Path,
    *,
    seconds: float = 4.0,
    width: int = 160,
    height: int = 112,
    seed: int = 0,
    picture: bool = True,
    sound: bool = True,
) -> Path:
    """Writes an mp4 (MPEG-4 picture, AAC sound) and returns its path. The seed decides colours, path and pitch.

    Args:
        path: file to write, overwritten if it exists.
        seconds: duration, above 0.
        width, height: size of the picture in pixels, even.
        picture, sound: which of the two streams the file gets; at least one.
    """
    if not picture and not sound:
        raise ValueError("a clip needs picture or sound, both are switched off")
    if seconds <= 0 or width < 2 or height < 2 or width % 2 or height % 2:
        raise ValueError(f"need seconds above 0 and an even width and height, got {seconds} s, {width} x {height}")
    rng = np.random.default_rng(seed)
    frames = draw_frames(rng, max(1, round(seconds * FRAME_RATE)), width, height)
    wave = draw_tone(rng, max(1, round(seconds * AUDIO_RATE)))
    return encode_clip(path, frames if picture else None, wave if sound else None, FRAME_RATE, AUDIO_RATE)


def encode_clip(
    path: str | Path, frames: np.ndarray | None, wave: np.ndarray | None, frame_rate: int, audio_rate: int
) -> Path:
    """Writes frames (uint8 [T, H, W, 3]) and sound (float32 [samples]), or one of them, as an mp4; returns its path."""
    path = Path(path)
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=frame_rate) if frames is not None else None
        audio = container.add_stream("aac", rate=audio_rate, layout="mono", options=FAST) if wave is not None else None
        if video is not None:
            video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
            video.bit_rate = 800_000
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, frame_rate)
                container.mux(video.encode(frame))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = audio_rate, 0
            container.mux(audio.encode(frame))
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))
    return path


def draw_frames(rng: np.random.Generator, count: int, width: int, height: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: a disc on an ellipse around the centre, once around every two seconds."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    dark, disc = rng.integers(10, 90, 3), rng.integers(140, 256, 3)
    background = (x / width + y / height)[..., None] / 2 * dark
    angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(count) / (2 * FRAME_RATE)
    centre_x = width * (0.5 + 0.3 * np.cos(angle))
    centre_y = height * (0.5 + 0.3 * np.sin(angle))
    distance = np.hypot(x - centre_x[:, None, None], y - centre_y[:, None, None])
    inside = distance < 0.15 * min(width, height)
    return np.where(inside[..., None], disc, background).astype(np.uint8)


def draw_tone(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count] in [-0.5, 0.5]: a sine of 200 to 800 Hz whose loudness rises and falls twice a second."""
    time = np.arange(count) / AUDIO_RATE
    loudness = 0.25 * (1 - np.cos(2 * np.pi * 2 * time))
    return (loudness * np.sin(2 * np.pi * rng.uniform(200, 800) * time)).astype(np.float32)
