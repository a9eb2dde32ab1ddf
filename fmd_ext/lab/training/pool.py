"""Pictures and sounds of many clips, as the processor sees them after a real file was written and read.

Picture and sound are rendered apart, so that training can join any picture with any sound.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.synthetic import Scene, write_scene


class Pool:
    """Pictures and sounds with what is seen and heard in them.

    Attributes:
        frames: uint8 [items, T, H, W, 3].
        mels: float16 [items, mel bins, mel frames].
        seen, heard: per item, as in ``Scene``.
    """

    def __init__(self, frames: np.ndarray, mels: np.ndarray, seen: list[tuple], heard: list[tuple]) -> None:
        self.frames, self.mels, self.seen, self.heard = frames, mels, seen, heard
        self.pictures = _index(seen)
        self.sounds = _index(heard)

    @classmethod
    def load(cls, folder: Path) -> Pool:
        labels = json.loads((folder / "labels.json").read_text())
        seen, heard = ([tuple(item) for item in labels[name]] for name in ("seen", "heard"))
        return cls(np.load(folder / "frames.npy", mmap_mode="r"), np.load(folder / "mels.npy"), seen, heard)


def build_pool(folder: Path, processor: Any, scenes: Sequence[Scene]) -> Pool:
    """Renders, encodes, decodes and saves the clips of ``scenes``; takes what is there already.

    Raises ValueError when the folder holds other clips.
    """
    labels = {"seen": [list(scene.seen) for scene in scenes], "heard": [list(scene.heard) for scene in scenes]}
    if not (folder / "labels.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        frames, mels = [], []
        with tempfile.TemporaryDirectory(prefix="fmd_ext_") as scratch:
            for scene in tqdm(scenes, desc="rendering clips", delay=1.0, mininterval=5.0, disable=None):
                path = write_scene(Path(scratch) / "clip.mp4", scene)
                clip = load_clip(path, sampling_rate=processor.feature_extractor.sampling_rate, progress=False)
                frames.append(clip.frames)
                mels.append(mel_of(processor, clip.audio))
        np.save(folder / "frames.npy", np.stack(frames))
        np.save(folder / "mels.npy", np.stack(mels))
        (folder / "labels.json").write_text(json.dumps(labels))
    elif json.loads((folder / "labels.json").read_text()) != labels:
        raise ValueError(f"{folder} holds other clips than those asked for: delete it")
    return Pool.load(folder)


def mel_of(processor: Any, audio: np.ndarray) -> np.ndarray:
    """float16 [mel bins, frames] of a waveform, padding left out, as the processor computes it."""
    extractor = processor.feature_extractor
    features = extractor(
        audio,
        sampling_rate=extractor.sampling_rate,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    return features["input_features"][0][:, features["attention_mask"][0].astype(bool)].astype(np.float16)


def _index(labels: list[tuple]) -> dict[tuple, np.ndarray]:
    """What is seen or heard -> the items of which it is true."""
    found: dict[tuple, list[int]] = {}
    for item, label in enumerate(labels):
        found.setdefault(label, []).append(item)
    return {label: np.array(items) for label, items in found.items()}
