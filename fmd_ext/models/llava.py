"""What models built like LLaVA share: the place of the vision tower, and the projector behind it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModel


class VisionTower(nn.Module):
    """Holds the frames' encoder under the name that it has in official models."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_tower = AutoModel.from_config(config)


def mlp(depth: int, in_channels: int, channels: int) -> nn.Sequential:
    """``depth`` linear layers with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(in_channels, channels)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(channels, channels)]
    return nn.Sequential(*layers)
