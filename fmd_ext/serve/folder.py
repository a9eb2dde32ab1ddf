"""A thinker alone as the folder of a full model, which is what vLLM knows by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fmd_ext.serve.tokens import PLACEHOLDERS

# model_type of a thinker -> model_type and architecture of the full model
_FULL = {
    "qwen2_5_omni_thinker": ("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration"),
    "qwen3_omni_moe_thinker": ("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration"),
}
_ROWS_PER_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def is_thinker(folder: str | Path) -> bool:
    """Whether a folder holds a thinker alone, which vLLM has no architecture for."""
    try:
        return json.loads((Path(folder) / "config.json").read_text()).get("model_type") in _FULL
    except (OSError, ValueError):
        return False


def write_full_model(source: str | Path, target: str | Path) -> Path:
    """Copies a thinker's folder as that of a full Qwen2.5-Omni or Qwen3-Omni without talker.

    The configuration goes under ``thinker_config``, the weights under ``thinker.``. Where the tokenizer leaves fewer
    than three ids of the vocabulary unused, the embeddings get three more rows, of zeros.

    Args:
        source: folder with config.json, safetensors, tokenizer and processor.
        target: created if missing; files of the same names are replaced.

    Returns: ``target``.

    Raises:
        OSError: a file is missing or cannot be written.
        ValueError: the folder holds no thinker.
    """
    source, target = Path(source), Path(target)
    config = json.loads((source / "config.json").read_text())
    if config.get("model_type") not in _FULL:
        raise ValueError(f"{source} is of type {config.get('model_type')!r}; accepted are {', '.join(sorted(_FULL))}")
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)

    text = config["text_config"]
    more = len(PLACEHOLDERS) if _highest_token(source) >= text["vocab_size"] - len(PLACEHOLDERS) else 0
    weights = {f"thinker.{name}": _with_rows(name, tensor, more) for name, tensor in _tensors(source)}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    text["vocab_size"] += more
    # vLLM asks the text's configuration. A thinker's own says nothing of it, and transformers fills in True.
    text["tie_word_embeddings"] = "thinker.lm_head.weight" not in weights
    full, architecture = _FULL[config["model_type"]]
    written = {
        "architectures": [architecture],
        "model_type": full,
        "thinker_config": config,
        "enable_audio_output": False,
        "dtype": config.get("dtype"),
    }
    (target / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return target


def _highest_token(source: Path) -> int:
    content: dict[str, Any] = json.loads((source / "tokenizer.json").read_text())
    return max([*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", ()))])


def _tensors(source: Path):
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} holds no safetensors")
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def _with_rows(name: str, tensor: torch.Tensor, more: int) -> torch.Tensor:
    if not more or name not in _ROWS_PER_TOKEN:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(more, tensor.shape[1])])
