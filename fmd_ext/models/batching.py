"""Several samples as one batch: prompts padded on the left, features with zeros behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def padded_prompts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Token ids of several prompts as input_ids and attention_mask, int64 [batch, longest], padded on the left."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def stacked(samples: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[batch, longest, ...], zero behind a sample's own; a sample may have nothing. None where none has anything."""
    present = [sample for sample in samples if sample is not None]
    if not present:
        return None
    out = present[0].new_zeros(len(samples), max(map(len, present)), *present[0].shape[1:])
    for row, sample in zip(out, samples, strict=True):
        if sample is not None:
            row[: len(sample)] = sample
    return out
