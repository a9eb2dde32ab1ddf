"""Loads video-SALMONN from the files that its authors name: their own checkpoint and the five models it builds on.

The official layout, in one folder::

    MultiResQFormer/pytorch_model_*.pt                    joint Q-Former, projections, LoRA
    pretrained_ckpt/instruct_blip_vicuna13b_trimmed.pth   InstructBLIP's Q-Former
    pretrained_ckpt/eva_vit_g.pth                         its image encoder
    pretrained_ckpt/BEATs_*.pt                            BEATs
    pretrained_ckpt/{vicuna-13b-v1.5, whisper-large-v2, bert-base-uncased}/

The last three are folders in transformers' own format (for BERT the tokenizer is enough); one that is not there is
taken from the hub, as the official code does. A ``config.json`` of ours in the folder replaces the published sizes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from fmd_ext.models.loading import merge_lora, some

from .configuration import VideoSalmonnConfig
from .modeling import VideoSalmonnForConditionalGeneration
from .processing import VideoSalmonnProcessor

LORA_ALPHA = 32
HUB_NAMES = {
    "vicuna-13b-v1.5": "lmsys/vicuna-13b-v1.5",
    "whisper-large-v2": "openai/whisper-large-v2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
}

# The official model holds these modules under several names; a checkpoint may use any of them.
_ALIASES = (
    (r"^(speech|joint)_Qformer\.", "video_Qformer."),
    (r"^(speech|joint)_query_tokens$", "video_query_tokens"),
    (r"^ln_(speech|joint)\.", "ln_video."),
    (r"^joint_frame_position_embedding\.", "video_frame_position_embedding."),
    (r"^llama_proj_(speech|joint)\.", "llama_proj."),
)
# Official name -> ours; rules apply in turn.
_RENAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^video_Qformer\.bert\.embeddings\.LayerNorm\.", "joint_qformer.query_norm."),
    (r"^video_Qformer\.bert\.encoder\.layer\.", "joint_qformer.layers."),
    (r"\.encoder_causal_attention\.", ".feature_attention."),
    (r"^(qformer|joint_qformer)\.(.*attention)\.self\.", r"\1.\2.attention."),
    (r"^video_query_tokens$", "joint_qformer.query_tokens"),
    (r"^low_query_tokens$", "joint_qformer.fine_query_tokens"),
    (r"^ln_video\.", "joint_qformer.norm."),
    (r"^video_frame_position_embedding\.", "joint_qformer.position_embedding."),
    (r"^speech_pre_qformer_proj\.", "speech_projection."),
    (r"^beats_pre_qformer_proj\.", "beats_projection."),
    (r"^llama_proj\.", "projector."),
    (r"^llama_model\.(base_model\.model\.)?model\.", "language_model."),
    (r"^llama_model\.(base_model\.model\.)?lm_head\.", "lm_head."),
)
# In the files, but no part of the model: what training or other models need, and a Q-Former that is never run.
_UNUSED = re.compile(
    r"^(low_Qformer|Qformer\.cls|llm_proj|t5_proj)\.|^visual_encoder\.(norm|fc_norm|head|mask_token)"
    r"|\.position_ids$|\.rotary_emb\.inv_freq$|^beats\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\."
)


def is_official_folder(folder: str | Path) -> bool:
    """Whether ``folder`` holds the authors' own checkpoint (see the module's docstring)."""
    return any(Path(folder).glob("MultiResQFormer/pytorch_model*.pt"))


def load_official(
    folder: str | Path, *, dtype: Any = "auto", lora_alpha: float = LORA_ALPHA, **options: Any
) -> tuple[VideoSalmonnForConditionalGeneration, VideoSalmonnProcessor]:
    """Model (in eval mode) and processor from the official files.

    Args:
        folder: see the module's docstring.
        dtype: of the weights; ``"auto"`` is float16, as the authors run it.
        lora_alpha: the LoRA weights are merged into the decoder's, scaled by ``lora_alpha`` over their rank.
        **options: of ``from_pretrained``, such as ``device_map`` or ``quantization_config``.

    Raises:
        FileNotFoundError: a file of the layout is not there.
        ImportError: Vicuna's tokenizer needs packages that are not installed.
        ValueError: files that lack tensors, hold unknown ones, or ones of another shape; they are named.
    """
    folder = Path(folder)
    config = official_config(folder)
    state = official_state(folder, config, lora_alpha)
    model = VideoSalmonnForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float16 if dtype == "auto" else dtype, **options
    )
    return model.eval(), official_processor(folder, config)


def official_config(folder: Path) -> VideoSalmonnConfig:
    """Of the published sizes, with those of the parts that have a configuration of their own."""
    if (folder / "config.json").exists():
        return VideoSalmonnConfig.from_pretrained(folder)
    return VideoSalmonnConfig(
        text_config=_part(folder, "vicuna-13b-v1.5", AutoConfig),
        speech_config=_part(folder, "whisper-large-v2", WhisperConfig),
        beats_config=dict(_read(_one(folder, "pretrained_ckpt/BEATs_*.pt"))["cfg"]),
    )


def official_processor(folder: Path, config: VideoSalmonnConfig) -> VideoSalmonnProcessor:
    try:
        tokenizer = _part(folder, "vicuna-13b-v1.5", AutoTokenizer)
    except (ImportError, ValueError) as error:
        if all(importlib.util.find_spec(name) for name in ("sentencepiece", "google")):
            raise
        raise ImportError(
            "Vicuna's tokenizer is a SentencePiece model, and the packages that read it are not installed: "
            "pip install 'fmd-ext[video-salmonn]'"
        ) from error
    return VideoSalmonnProcessor.of_config(
        config,
        _part(folder, "whisper-large-v2", WhisperFeatureExtractor),
        tokenizer,
        _part(folder, "bert-base-uncased", AutoTokenizer),
    )


def official_state(folder: Path, config: VideoSalmonnConfig, lora_alpha: float = LORA_ALPHA) -> dict[str, torch.Tensor]:
    """The state dict of our model, by our names, checked against it. Raises as `load_official` does."""
    own = _one(folder, "MultiResQFormer/pytorch_model*.pt")
    blip = _one(folder, "pretrained_ckpt/instruct_blip*.pth")
    eva = _one(folder, "pretrained_ckpt/eva_vit_g.pth")
    beats = _one(folder, "pretrained_ckpt/BEATs_*.pt")
    whisper = _part(folder, "whisper-large-v2", WhisperModel)
    vicuna = _part(folder, "vicuna-13b-v1.5", AutoModelForCausalLM, dtype="auto")
    sources = (
        _prefixed("visual_encoder.", _read(eva)),
        _read(blip, "model"),
        _prefixed("beats.", _read(beats, "model")),
        _prefixed("speech_encoder.", whisper.encoder.state_dict()),
        _prefixed("llama_model.", vicuna.state_dict()),
        _read(own),
    )
    state: dict[str, torch.Tensor] = {}
    for tensors in sources:
        state.update(our_names(tensors, config.vision_config.num_hidden_layers))
    state = merge_lora(state, lora_alpha, own.name)
    check_state(state, config)
    return state


def our_names(official: Mapping[str, torch.Tensor], vision_layers: int) -> dict[str, torch.Tensor]:
    """The tensors of an official file under our names, unused ones left out, q and v biases of EVA joined."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in official.items():
        block = re.match(r"^visual_encoder\.blocks\.(\d+)\.", name)
        if _UNUSED.search(name) or (block and int(block[1]) >= vision_layers):
            continue  # EVA has one block more than InstructBLIP uses
        for rules in (_ALIASES, _RENAMES):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [n for n in renamed if n.endswith(".self_attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        if stem + "v_bias" in renamed:
            q, v = renamed.pop(name), renamed.pop(stem + "v_bias")
            renamed[stem + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return renamed


def check_state(state: Mapping[str, torch.Tensor], config: VideoSalmonnConfig) -> None:
    """Raises ValueError that names tensors of our model that ``state`` lacks, strange ones, and other shapes."""
    with torch.device("meta"):
        expected = VideoSalmonnForConditionalGeneration(config).state_dict()
    faults = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    said = [f"{len(names)} tensors are {kind}: {some(names)}" for kind, names in faults.items() if names]
    if said:
        raise ValueError(f"these files do not make a video-SALMONN; {'; '.join(said)}")


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} must hold one file {pattern}, it holds {', '.join(f.name for f in found) or 'none'}"
        )
    return found[0]


def _part(folder: Path, name: str, kind: Any, **options: Any) -> Any:
    """A part in transformers' format, from its folder, else from the hub by way of the official cache."""
    local = folder / "pretrained_ckpt" / name
    if local.is_dir():
        return kind.from_pretrained(local, **options)
    return kind.from_pretrained(HUB_NAMES[name], cache_dir=folder / "pretrained_ckpt", **options)


def _read(file: Path, key: str | None = None) -> dict[str, Any]:
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return content[key] if key is not None and key in content else content


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
