"""The ported models, small and with seeded weights, and batches of clips and questions for each of them.

Every port has a batch ``one`` (a clip with both senses), ``padded`` (two of them, prompts of unequal length) and
``mixed`` (samples that fork between others that do not). Scenarios over all ports lie in tests/models/test_ports*.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from fmd_ext.inputs.chat import prepare_batch
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.tiny import video_salmonn2_plus, videollama2
from fmd_ext.models.video_salmonn2 import VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Processor
from seeded_weights import fill
from video_salmonn2_recorded import SMALL as SALMONN2_SMALL
from video_salmonn2_recorded import tokenizer as salmonn2_tokenizer
from video_salmonn_files import tiny_model as tiny_video_salmonn

# A call's inputs, by name.
Inputs = dict[str, Any]

TOKEN_WISE = [
    {"masking": "zero", "fork_layers": 2, "alpha": 0.7, "text_weight": 0.4},
    {"masking": "zero", "fork_layers": "all", "mask_scale": 0.3, "alpha": {"visual": 0.9, "audio": 0.6}},
    {"masking": "attention", "fork_layers": 2, "text_weight": 0.4},
]
CHANNEL_WISE = [
    {"fork_layers": 2, "mask_scale": 0.4},
    {"fork_layers": "all", "text_weight": 0.3},
    {"fork_layers": 1},
]


@dataclasses.dataclass(frozen=True)
class Port:
    """A ported model.

    Args:
        make: the model, in eval mode.
        together: (model, conversations) -> the inputs of a batch.
        batches: conversations by name, as ``together`` takes them.
        forked: which samples of a batch fork.
        settings: of fork-merge decoding; ``"all"`` stands for all layers.
        options: of ``generate``, which the model's own settings lack.
        moves: by how much forking must move a sample's logits at least.
    """

    name: str
    make: Callable[[], nn.Module]
    together: Callable[[nn.Module, list], Inputs]
    batches: dict[str, list]
    forked: dict[str, list[bool]]
    settings: list[dict[str, Any]] = dataclasses.field(default_factory=lambda: TOKEN_WISE)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    moves: float = 0.02

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def model(self) -> nn.Module:
        """Made once. Who patches it takes the patch off again."""
        return self.make()

    @property
    def num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    def setting(self, number: int) -> dict[str, Any]:
        """The ``number``-th of ``settings``."""
        chosen = dict(self.settings[number])
        if chosen["fork_layers"] == "all":
            chosen["fork_layers"] = self.num_layers
        return chosen

    def batch(self, name: str) -> Inputs:
        return self.together(self.model, self.batches[name])

    def samples(self, name: str) -> list[Inputs]:
        """The batch's samples, each prepared alone."""
        return [self.together(self.model, [conversation]) for conversation in self.batches[name]]

    def answer(self, inputs: Inputs, **options: Any) -> torch.Tensor:
        """New tokens [batch, length] of greedy decoding that no token ends."""
        greedy = {"do_sample": False, "eos_token_id": None, **self.options, **options}
        return self.model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :]


def clip(
    seed: int, frames: int = 4, size: tuple[int, int] = (32, 48), seconds: float = 1.0, sound: bool = True
) -> Clip:
    """Noise to see and to hear; without picture where ``frames`` is 0."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8) if frames else None
    audio = rng.standard_normal(round(16000 * seconds)).astype(np.float32) * 0.1 if sound else None
    return Clip(picture, frames / seconds or 1.0, audio, 16000, seconds)


def conversations(of: Callable[..., Clip], second: list[Clip], last: Clip) -> dict[str, list]:
    """The three batches. ``second`` is what the second sample of the mixed one is about; ``last`` is only heard."""
    return {
        "one": [([of(0)], "Is it loud?")],
        "padded": [([of(0)], "Is it loud?"), ([of(1)], "What is the colour of the disc?")],
        "mixed": [([of(0, sound=False)], "What?"), (second, "Same?"), ([], "Who?"), ([last], "Eh?")],
    }


FORKED = {"one": [True], "padded": [True, True], "mixed": [False, True, False, False]}


# --- VideoLLaMA2 ------------------------------------------------------------------------------------------------------


def _videollama2_together(model: nn.Module, about: list) -> Inputs:
    """With sound of 72 frames of filter bank, not 2998, and short prompts, for the tests' time."""
    processor = videollama2.processor_for(model.config)
    whole = processor._sound
    processor._sound = lambda clip: whole(clip)[:72]
    processor.system_prompt = None
    return prepare_batch(processor, about)


def _videollama2(decoder: str) -> Port:
    return Port(
        f"videollama2_{decoder}",
        lambda: videollama2.tiny_videollama2(seed=0, decoder=decoder),
        _videollama2_together,
        conversations(clip, [clip(1), clip(2)], clip(3, frames=0)),
        FORKED,
    )


# --- video-SALMONN: channel-wise --------------------------------------------------------------------------------------


def _salmonn_together(model: nn.Module, about: list) -> Inputs:
    """Samples are (kind, number): "av" (both), "v", "a" or "t" (no clip); the number seeds and varies the sample."""
    config, rows = model.config, []
    ids = {"av": config.joint_token_id, "v": config.video_token_id, "a": config.audio_token_id}
    frames = [{"av": 5 + 8 * (number % 2), "v": 7}.get(kind, 0) for kind, number in about]
    heard = [{"av": 150, "a": 180}.get(kind, 0) for kind, _ in about]
    made: dict[str, list[torch.Tensor]] = {}
    for (kind, number), count, sound in zip(about, frames, heard, strict=True):
        generator = torch.Generator().manual_seed(number)
        tokens = config.num_tokens(count, bool(sound)) if kind != "t" else 0
        text = torch.randint(6, 97, (3 + number + 4,), generator=generator)
        rows.append(torch.cat([text[:3], torch.full((tokens,), ids.get(kind, 0)), text[3:]]))
        for name, shape in (
            ("pixel_values", (13, 3, 28, 28)),
            ("input_features", (80, 200)),
            ("beats_features", (180, 128)),
        ):
            made.setdefault(name, []).append(torch.randn(shape, generator=generator))
        made.setdefault("qformer_input_ids", []).append(torch.randint(0, 51, (5,), generator=generator))
    length = max(map(len, rows))
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return {
        "input_ids": torch.stack([nn.functional.pad(row, (length - len(row), 0)) for row in rows]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        **{name: torch.stack(values) for name, values in made.items()},
        "num_frames": torch.tensor(frames),
        "qformer_attention_mask": torch.ones(len(about), 5, dtype=torch.long),
        "num_beats_frames": torch.tensor(heard),
    }


VIDEO_SALMONN = Port(
    "video_salmonn",
    lambda: tiny_video_salmonn(),
    _salmonn_together,
    {
        "one": [("av", 0)],
        "padded": [("av", 0), ("av", 3)],
        "mixed": [("av", 0), ("t", 1), ("v", 2), ("av", 3), ("a", 4)],
        "clips": [("av", 0), ("v", 1), ("av", 2)],
    },
    {
        "one": [True],
        "padded": [True, True],
        "mixed": [True, False, False, True, False],
    },
    settings=CHANNEL_WISE,
    options={"pad_token_id": 0},
    moves=0.01,
)


# --- video-SALMONN 2 --------------------------------------------------------------------------------------------------


def _salmonn2() -> nn.Module:
    """As in the recording, but frames of 6 tokens and windows of sound of 3 s, of 6 tokens."""
    settings = copy.deepcopy(SALMONN2_SMALL)
    settings["vision_config"]["image_size"] = 10
    settings["audio_config"]["max_source_positions"] = 150
    model = VideoSalmonn2ForConditionalGeneration(AutoConfig.for_model(**settings)).eval()
    fill(model.state_dict(), 6)
    assert (model.config.num_frame_tokens, model.config.num_sound_tokens) == (6, 6)
    return model


def _salmonn2_clip(seed: int, frames: int = 5, seconds: float = 5.0, sound: bool = True) -> Clip:
    return clip(seed, frames, (24, 32), seconds, sound)


_SALMONN2_BATCHES = conversations(_salmonn2_clip, [_salmonn2_clip(1)], _salmonn2_clip(3, frames=0))
_SALMONN2_BATCHES["padded"][1] = ([_salmonn2_clip(1, frames=2, seconds=0.1)], "What is the colour of the disc?")
VIDEO_SALMONN2 = Port(
    "video_salmonn2",
    _salmonn2,
    lambda model, about: prepare_batch(VideoSalmonn2Processor.from_config(model.config, salmonn2_tokenizer()), about),
    _SALMONN2_BATCHES,
    FORKED,
)


# --- video-SALMONN 2+ -------------------------------------------------------------------------------------------------


def _plus_clip(seed: int, frames: int = 6, seconds: float = 7.0, sound: bool = True) -> Clip:
    return clip(seed, frames, (28, 56), seconds, sound)


def _plus(counted: str) -> Port:
    """``counted``: how M-RoPE positions are counted, see `VideoSalmonn2PlusConfig`."""
    return Port(
        f"video_salmonn2_plus_{counted}",
        lambda: video_salmonn2_plus.tiny_video_salmonn2_plus(seed=0, mrope_positions=counted),
        lambda model, about: prepare_batch(
            video_salmonn2_plus.processor_for(model.config), about, frame_pixels=(784, 1568)
        ),
        conversations(_plus_clip, [_plus_clip(1), _plus_clip(2, seconds=31.0)], _plus_clip(3, frames=0)),
        FORKED,
    )


PORTS = {
    port.name: port
    for port in (
        _videollama2("qwen2"),
        _videollama2("mistral"),
        VIDEO_SALMONN,
        VIDEO_SALMONN2,
        _plus("inference"),
        _plus("training"),
    )
}
