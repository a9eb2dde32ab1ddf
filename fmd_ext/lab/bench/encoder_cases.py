"""``first_token``: a clip's patches and mel frames in, one token out. Encoders and decoder with random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_logits

from .cases import Candidate, Case
from .checking import Reference
from .models import build_thinker, sharing_weights
from .roofline import Work
from .timing import Step
from .workload import Clip, Workload

NAME = "first_token"
ENCODER_SIZE = 320  # channels of the encoders; those of the size "full" are as published
FLOAT32_ERROR = 1e-3  # encoders in front: what they round goes through all layers
WORD = 40  # any word of the vocabulary
TEXT_BEFORE, TEXT_BEHIND = 20, 56
# Settings of `patch`; None is the unpatched model.
WAYS: dict[str, dict[str, Any] | None] = {
    "vanilla": None,
    "attention masking": {"masking": "attention"},
    "zero masking": {"masking": "zero"},
    "zero masking, no fusions": {"masking": "zero", "fusions": False},
}


def cases(workload: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    if not workload.clips:
        return
    model = build_thinker(workload.size, None, dtype, device, encoder_size=ENCODER_SIZE)
    layers = workload.size.num_layers
    exact_model = model if dtype == torch.float32 else copy.deepcopy(model).float()
    for clip in workload.clips:
        inputs = inputs_of(model.config, clip, dtype, device)
        rows = inputs["input_ids"].shape[1]
        references: dict[FMDConfig, Reference] = {}
        candidates = []
        for name, settings in WAYS.items():
            given = {"fork_layers": 0} if settings is None else {"fork_layers": workload.size.fork_layers, **settings}
            given.pop("fusions", None)
            config = FMDConfig(**given).resolve(FMDConfig(), layers)
            if config not in references:
                references[config] = _reference(model, exact_model, config, inputs)
            own = sharing_weights(model)
            if settings is not None:
                fmd_ext.patch(own, fork_layers=workload.size.fork_layers, runner=False, **settings)
            step = Step(_first_token(own, inputs), from_idle=True)
            candidates.append(Candidate(name, step, lambda out: [out.logits[0]], references[config]))
        shapes = {"rows": rows, "patches": list(clip.grid), "mel frames": clip.mel_frames, "layers": layers}
        yield Case(NAME, f"{rows} rows", shapes, candidates, _least_work(model, clip, rows))


def inputs_of(config: Any, clip: Clip, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What a processor makes of a clip and a question, with random patches and mel frames."""
    frames, height, width = clip.grid
    vision, audio = config.vision_config, config.audio_config
    video_tokens = frames * height * width // vision.spatial_merge_size**2
    audio_tokens = ((clip.mel_frames - 1) // 2 + 1 - 2) // 2 + 1
    ids = [WORD] * TEXT_BEFORE
    ids += [config.vision_start_token_id, *[config.video_token_id] * video_tokens, config.vision_end_token_id]
    ids += [config.audio_start_token_id, *[config.audio_token_id] * audio_tokens, config.audio_end_token_id]
    ids += [WORD] * TEXT_BEHIND
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
        "pixel_values_videos": torch.randn(frames * height * width, values, dtype=dtype, device=device),
        "video_grid_thw": torch.tensor([clip.grid], device=device),
        "video_second_per_grid": torch.tensor([1.0], device=device),
        "input_features": torch.randn(1, audio.num_mel_bins, clip.mel_frames, dtype=dtype, device=device),
        "feature_attention_mask": torch.ones(1, clip.mel_frames, dtype=torch.long, device=device),
    }


def _least_work(model: nn.Module, clip: Clip, rows: int) -> Work:
    """Every weight read once, and used for every patch, every second mel frame or every row of the decoder."""
    used = {"visual.": math.prod(clip.grid), "audio_tower.": clip.mel_frames // 2, ".layers.": rows}
    weights = flops = 0
    for name, weight in model.named_parameters():
        uses = next((count for part, count in used.items() if part in name), 0)
        flops += 2 * weight.numel() * uses
        weights += weight.numel() * weight.element_size() * bool(uses)
    return Work(weights, flops)


def _reference(model: nn.Module, exact_model: nn.Module, config: FMDConfig, inputs: dict[str, Tensor]) -> Reference:
    """The last position's logits by two plain passes, exact and in the model's dtype."""

    def last(of: nn.Module) -> Tensor:
        dtype = next(of.parameters()).dtype
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return reference_logits(of, config, **given)[:, -1]

    exact = last(exact_model)
    return Reference([exact], FLOAT32_ERROR) if exact_model is model else Reference.beside([exact], [last(model)])


def _first_token(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    return lambda: model.generate(**inputs, **options)
