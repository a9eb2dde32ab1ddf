"""The spatial-temporal convolution (STC) connector: from frames' patches to positions of the decoder."""

from __future__ import annotations

import functools

import torch
from torch import nn

from fmd_ext.models.llava import mlp
from fmd_ext.torchvision_mend import torchvision_advice


class STCConnector(nn.Module):
    """RegNet stage over each frame, a strided 3D convolution over time and space, a second stage, an MLP.

    Args:
        in_channels, channels: of the vision tower and of the decoder.
        padding: of the 3D convolution: 1 in VideoLLaMA2 (``stc_connector``), 0 in 2.1 (``stc_connector_v35``).
        depth: blocks per stage.
    """

    def __init__(self, in_channels: int, channels: int, padding: int, depth: int = 4) -> None:
        super().__init__()
        stage = _regnet_stage()
        self.s1 = stage(depth=depth, in_chs=in_channels, out_chs=channels)
        self.sampler = nn.Sequential(nn.Conv3d(channels, channels, kernel_size=2, stride=2, padding=padding), nn.SiLU())
        self.s2 = stage(depth=depth, in_chs=channels, out_chs=channels)
        self.readout = mlp(2, channels, channels)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[batch, frames, patches, in_channels], patches row by row of a square -> [batch, tokens, channels]."""
        batch, frames, count, channels = patches.shape
        side = int(count**0.5)
        hidden = self.s1(patches.reshape(batch * frames, side, side, channels).permute(0, 3, 1, 2))
        hidden = self.sampler(hidden.unflatten(0, (batch, frames)).transpose(1, 2))  # [batch, channels, t, h, w]
        hidden = self.s2(hidden.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1))  # [batch, t, channels, h, w]
        return self.readout(hidden.permute(0, 1, 3, 4, 2).flatten(1, 3))


def _regnet_stage() -> functools.partial:
    try:
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage
    except ImportError as error:
        raise ImportError(
            f"VideoLLaMA2's connector is built from timm's ({error}): {torchvision_advice()} && pip install timm"
        ) from error
    return functools.partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
