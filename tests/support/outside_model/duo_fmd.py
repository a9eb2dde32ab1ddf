"""What the owner of that model publishes, so that fmd_ext serves it: an adapter, a loader, and how it is asked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from fmd_ext.adapters import Adapter, TokenSource

ADAPTER = Adapter(
    name="Duo",
    model_types=("duo",),
    entry=("",),
    decoder=("llm.model",),
    sources=(
        TokenSource("visual", "seen_token_id", ("patches",)),
        TokenSource("audio", "heard_token_id", ("sounds",)),
    ),
    rotary="apply_rotary_pos_emb",
)


class DuoProcessor:
    """A `fmd_ext.inputs.chat.ClipProcessor`: a token per frame, by its mean colours, and one per 0.1 s of sound."""

    clip_arguments = {"num_frames": 4, "sampling_rate": 16000}

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, source: str) -> DuoProcessor:
        return cls(AutoTokenizer.from_pretrained(source))

    def render(self, clips: Any, question: str, system_prompt: str | None) -> str:
        return "".join("<clip>" for _ in clips) + question

    def prepare_clips(self, conversations: Any, **options: Any) -> dict[str, torch.Tensor]:
        rows, patches, sounds = [], [], []
        for clips, question in conversations:
            row = []
            for clip in clips:
                if clip.frames is not None:
                    grid = torch.from_numpy(clip.frames).float().div(255).flatten(1)
                    patches.append(torch.nn.functional.adaptive_avg_pool1d(grid[:, None], 48)[:, 0])
                    row += [1] * len(grid)
                if clip.audio is not None:
                    pieces = torch.from_numpy(clip.audio).unfold(0, 1600, 1600).reshape(-1, 40, 40).square().mean(2)
                    sounds.append(pieces.sqrt())
                    row += [2] * len(pieces)
            rows.append([3, *row, *self.tokenizer(question)["input_ids"]])
        longest = max(map(len, rows))
        inputs = {
            "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        for name, values in (("patches", patches), ("sounds", sounds)):
            if values:
                inputs[name] = torch.cat(values)
        return inputs


class DuoLoader:
    """Whoever installs this package trusts the code in the checkpoint."""

    processor_class = DuoProcessor

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> Any:
        return AutoModel.from_pretrained(source, trust_remote_code=True, **options)
