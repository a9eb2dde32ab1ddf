"""The bundled model in vLLM and in the library: the same question asked of both.

An ask is a list of parts and a question. Parts are ``("video", clip)``, ``("audio", clip)``, ``("image", clip)`` and
``("both", clip)``, which is a video with its sound interleaved; ``clip`` counts the bundled clips.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import torch

import fmd_ext
from fmd_ext.cli.models import load_model
from fmd_ext.config import FILE_KEY
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.trained import MODEL, bundled_scenes
from fmd_ext.serve import ARCHITECTURES

# None of them is what it would be by default.
SETTINGS = {"fork_layers": 2, "alpha": {"visual": 0.9, "audio": 0.7}, "text_weight": 0.4, "mask_scale": 0.1}
FRAMES = {"shortest_edge": 9408, "longest_edge": 9408}  # of the bundled model; its processor's class has other defaults
# Ids that the written folder adds to those of the bundled model.
FIRST_RESERVED = json.loads((MODEL / "config.json").read_text())["text_config"]["vocab_size"]
_MARKED = {
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}
SYSTEM = "You are a helpful assistant."


@dataclasses.dataclass(frozen=True)
class Ask:
    question: str
    parts: tuple[tuple[str, int], ...] = ()
    system: str = SYSTEM

    @property
    def interleaved(self) -> bool:
        return any(kind == "both" for kind, _ in self.parts)

    @property
    def text(self) -> str:
        media = "".join(_MARKED["video" if kind == "both" else kind] for kind, _ in self.parts)
        turns = f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n{media}{self.question}<|im_end|>\n"
        return f"{turns}<|im_start|>assistant\n"

    def media(self) -> dict[str, list[Any]]:
        """frames uint8 [T, H, W, 3] by ``video``, [H, W, 3] by ``image``; sound by ``audio``."""
        found: dict[str, list[Any]] = {}
        for kind, number in self.parts:
            clip = bundled_clip(number)
            if kind in ("video", "both"):
                found.setdefault("video", []).append(clip.frames)
            if kind in ("audio", "both"):
                found.setdefault("audio", []).append(clip.audio)
            if kind == "image":
                found.setdefault("image", []).append(clip.frames[0])
        return found

    def prompt(self, **processor_options: Any) -> dict[str, Any]:
        """What vLLM's ``generate`` takes."""
        media = self.media()
        if "image" in media:
            from PIL import Image

            media["image"] = [Image.fromarray(frame) for frame in media["image"]]
        if "audio" in media:
            media["audio"] = [(sound, 16000) for sound in media["audio"]]
        options = {"use_audio_in_video": True} if self.interleaved else {}
        return {
            "prompt": self.text,
            **({"multi_modal_data": media} if media else {}),
            **({"mm_processor_kwargs": {**options, **processor_options}} if options or processor_options else {}),
        }


@functools.cache
def bundled_clip(number: int) -> Any:
    return load_clip(list(bundled_scenes())[number])


def start(
    folder: Any,
    settings: dict[str, Any] | None = None,
    *,
    plain: bool = False,
    architecture: str = "Qwen2_5OmniForConditionalGeneration",
    frames: dict[str, int] = FRAMES,
    **options: Any,
) -> Any:
    """An engine of vLLM in this process. ``plain``: without fork-merge decoding; ``architecture``: vLLM's own name."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 2, "video": 2, "audio": 2},
        "mm_processor_kwargs": {"videos_kwargs": {"size": frames, "fps": 2.0}},
        "hf_overrides": {"architectures": [architecture if plain else ARCHITECTURES[architecture][0]]},
        "additional_config": {FILE_KEY: settings} if settings is not None else {},
        "kv_cache_memory_bytes": 64 * 2**20,
        "seed": 0,
    }
    return LLM(str(folder), **{**defaults, **options})


def greedy(tokens: int = 8, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, **more)


def answers(engine: Any, prompts: list[dict[str, Any]], sampling: Any) -> list[Any]:
    """Outputs of vLLM, in order, for prompts that it gets all at once."""
    return engine.generate(prompts, sampling, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


class Library:
    """A model in the library, the bundled one if no other is named, patched with the settings of the server.

    ``settings``: None for a model that is not patched.
    """

    def __init__(self, settings: dict[str, Any] | None, source: Any = MODEL, frames: dict[str, int] = FRAMES) -> None:
        loaded = load_model(str(source))
        self.model, self.processor, self.frames = loaded.model, loaded.processor, frames
        self.model.generation_config.suppress_tokens = None
        if settings is not None:
            fmd_ext.patch(self.model, masking="zero", **settings)

    def inputs(self, ask: Ask) -> dict[str, Any]:
        media = ask.media()
        given: dict[str, Any] = {}
        if "video" in media:
            given["videos"] = [torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in media["video"]]
            given["videos_kwargs"] = {"fps": 2.0, "do_sample_frames": False, "size": self.frames}
        if "image" in media:
            given["images"] = [torch.from_numpy(frame).permute(2, 0, 1) for frame in media["image"]]
        if "audio" in media:
            given["audio"] = media["audio"]
        if ask.interleaved:
            from fmd_ext.inputs.chat import _interleaving_arguments

            given.update(_interleaving_arguments(self.processor, len(media["video"])))
        inputs = dict(self.processor(text=[ask.text], return_tensors="pt", padding=True, **given))
        if ask.interleaved:
            inputs["use_audio_in_video"] = True
        return inputs

    def answer(self, ask: Ask, count: int = 8) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, ended by the end of the turn or their number; log-probabilities of the first [vocabulary]."""
        inputs = self.inputs(ask)
        with torch.no_grad():
            out = self.model.generate(
                **inputs, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return new, torch.log_softmax(out.logits[0][0].float(), -1)


VIDEO, AUDIO, BOTH = (("video", 0),), (("audio", 0),), (("both", 0),)
SEPARATE = (("video", 0), ("audio", 0))
SOUND_FIRST = (("audio", 1), ("video", 2))
TWO_CLIPS = (("video", 0), ("audio", 0), ("video", 3), ("audio", 3))
TWO_INTERLEAVED = (("both", 4), ("both", 5))
IMAGE_AND_SOUND = (("image", 6), ("audio", 6))
ONE_MODALITY = {
    "text": Ask("What is a flute?"),
    "video": Ask("What can be seen?", VIDEO),
    "audio": Ask("What is making sound?", AUDIO),
    "image": Ask("What can be seen?", (("image", 2),)),
    "two videos": Ask("What can be seen?", (("video", 1), ("video", 2))),
}
BOTH_MODALITIES = {
    "separate": Ask("What is making sound?", SEPARATE),
    "sound first": Ask("Is the siren visible in the video?", SOUND_FIRST),
    "interleaved": Ask("What is making sound?", BOTH),
    "two clips": Ask("What is making sound?", TWO_CLIPS),
    "two interleaved": Ask("What can be seen?", TWO_INTERLEAVED),
    "image and sound": Ask("What is making sound?", IMAGE_AND_SOUND),
}
ALL = {**ONE_MODALITY, **BOTH_MODALITIES}
