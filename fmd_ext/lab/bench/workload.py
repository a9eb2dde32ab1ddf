"""What is measured on: model sizes in the proportions of Qwen2.5-Omni-7B, and a prompt with a clip."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fmd_ext.labels import AUDIO, TEXT, VISUAL


@dataclasses.dataclass(frozen=True)
class Size:
    """A text decoder's dimensions. ``fork_layers`` is a quarter of the layers."""

    name: str
    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    intermediate_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_qo_heads

    @property
    def fork_layers(self) -> int:
        return self.num_layers // 4


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Rows of one sample: text, video, text (the markers between), audio, text."""

    prefix: int
    visual: int
    between: int
    audio: int
    rest: int

    @property
    def length(self) -> int:
        return self.prefix + self.visual + self.between + self.audio + self.rest

    @property
    def labels(self) -> np.ndarray:
        """int8 [1, length]."""
        lengths = (self.prefix, self.visual, self.between, self.audio, self.rest)
        return np.repeat(np.array([TEXT, VISUAL, TEXT, AUDIO, TEXT], np.int8), lengths)[None]


# "quarter" is the 7B with every width divided by four (head_dim stays) and four layers; relative to its matrix products
# it has four times the attention of the 7B, so that what attention costs or saves is overstated, not hidden.
SIZES = {
    size.name: size
    for size in (
        Size("tiny", 4, 448, 7, 1, 512),
        Size("quarter", 4, 896, 7, 1, 4736),
        Size("full", 28, 3584, 28, 4, 18944),  # Qwen2.5-Omni-7B
    )
}


@dataclasses.dataclass(frozen=True)
class LongSize(Size):
    """A model whose memory is measured: with the words of its output layer, which make a row of logits."""

    vocab_size: int = 0

    @property
    def fork_layers(self) -> int:
        return max(1, self.num_layers // 4)

    def describe(self) -> dict[str, int]:
        return {
            "layers": self.num_layers,
            "fork_layers": self.fork_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
        }


# A layer more adds its keys and values to the peak, and nothing else: on a CPU two, of a fourteenth of the widths.
LONG_SIZES = {
    size.name: size
    for size in (
        LongSize("tiny", 2, 256, 2, 1, 1352, vocab_size=1024),
        LongSize("fourteenth", 2, 256, 2, 1, 1352, vocab_size=10862),
        LongSize("full", 28, 3584, 28, 4, 18944, vocab_size=152064),
    )
}
# Attention to 131,072 rows takes minutes per layer of a CPU.
LONG_ROWS = {"cpu": (32768,), "cuda": (32768, 131072)}
QUICK_LONG_ROWS = (4500,)
PROMPT = Prompt(prefix=20, visual=1400, between=2, audio=500, rest=58)  # 80 rows of text
QUICK_PROMPT = Prompt(prefix=5, visual=70, between=2, audio=25, rest=8)


def of_text(rows: int) -> Prompt:
    return Prompt(rows, 0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Extra:
    """A further situation of some ops.

    Args:
        variant: its name.
        phase: ``prefill``, or ``decode``: a token behind the prompt.
        ops: those that are measured in it.
        prompt: of each sample.
        batch: samples, all alike.
    """

    variant: str
    phase: str
    ops: tuple[str, ...]
    prompt: Prompt
    batch: int = 1

    @property
    def labels(self) -> np.ndarray:
        """int8 [batch, length]."""
        return self.prompt.labels.repeat(self.batch, axis=0)


# What a GPU is measured on besides: long and many prompts, whose attention is plainly causal, and a long clip.
EXTRAS = (
    *(
        Extra(name, "prefill", ("branched_prefill",), of_text(rows), batch)
        for name, rows, batch in (("2k", 2048, 1), ("8k", 8192, 1), ("32k", 32768, 1), ("8 of 2k", 2048, 8))
    ),
    Extra("long clip", "prefill", ("branched_prefill",), Prompt(64, 6000, 0, 1500, 100)),
    *(
        Extra(name, "decode", ("branched_decode",), of_text(rows), batch)
        for name, rows, batch in (("2k", 2048, 1), ("8 of 8k", 8192, 8), ("64 of 2k", 2048, 64))
    ),
    Extra("65,536 rows", "prefill", ("append_", "rope_append_"), of_text(2048), 32),
    Extra("32,768 pairs", "prefill", ("merge_",), Prompt(64, 16000, 0, 16668, 100)),
)
QUICK_EXTRAS = (
    Extra("batch", "prefill", ("branched_prefill", "append_", "rope_append_"), of_text(40), 3),
    Extra("batch", "decode", ("branched_decode",), of_text(40), 3),
    Extra("clip", "prefill", ("branched_prefill", "merge_"), Prompt(4, 30, 0, 20, 6)),
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """What encoders are given: patches [frames, height, width], 2 x 2 of which make a token; mel frames of 10 ms."""

    grid: tuple[int, int, int]
    mel_frames: int


# By device: a clip of 10 s, and on a GPU one of 90 s with 30 s of sound.
CLIPS = {"cpu": (Clip((10, 16, 16), 1000),), "cuda": (Clip((10, 28, 28), 1000), Clip((90, 28, 28), 3000))}
QUICK_CLIPS = (Clip((2, 4, 4), 100),)


@dataclasses.dataclass(frozen=True)
class Workload:
    size: Size
    prompt: Prompt
    extras: tuple[Extra, ...] = ()
    clips: tuple[Clip, ...] = ()

    def describe(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "size": {**dataclasses.asdict(self.size), "head_dim": self.size.head_dim},
            "prompt": {**dataclasses.asdict(self.prompt), "length": self.prompt.length},
            "fork_layers": self.size.fork_layers,
        }
