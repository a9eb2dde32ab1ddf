"""Deep-stack visual features on packed rows: what a decoder adds to the hidden states after its early layers.

Qwen3's visual models feed the decoder features of several depths of the image encoder: one at its input, the others
added to the visual positions after the first layers. They are visual content as the embeddings are, so a branch in
which the visual modality is masked gets them times ``mask_scale``; with attention masking it has no visual rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fmd_ext.engine.session import Session
from fmd_ext.labels import VISUAL


class PackedDeepstack:
    """Replacement of the decoder's method that adds features; the original then adds them to the right rows."""

    def __init__(self, session: Session, original: Any) -> None:
        self.session = session
        self.original = original

    def __call__(
        self, decoder: nn.Module, hidden: torch.Tensor, visual_positions: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Adds ``features`` [visual positions, hidden] to ``hidden`` [1, rows, hidden].

        ``visual_positions``: bool [batch, length] of the padded batch. The rows are all of the plan, or the home rows
        alone after the merge.
        """
        call, device = self.session.call, features.device
        if call is None:  # not within a patched forward call
            return self.original(hidden, visual_positions, features)
        plan, num_rows = call.plan, hidden.shape[1]
        positions = plan.tensors.get("positions", device)[:num_rows]
        flat = visual_positions.reshape(-1).to(device)
        rows = flat[positions]
        packed = features[(flat.cumsum(0) - 1)[positions[rows]]]
        if num_rows > plan.num_home and self.session.config.masking == "zero":
            scale = torch.ones(num_rows, dtype=features.dtype, device=device)
            masked = plan.tensors.get("away_modality", device) == VISUAL
            scale[plan.num_home :][masked] = self.session.config.mask_scale
            packed *= scale[rows, None]
        return self.original(hidden, rows[None], packed)
