"""BEATs (Chen et al., arXiv 2212.09058): the audio encoder that VideoLLaMA2 and video-SALMONN share. For inference.

Parameters have the names of Microsoft's checkpoints, so that a state dict of theirs loads as it is.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

SAMPLING_RATE = 16000
NUM_MEL_BINS = 128
FRAME_LENGTH, HOP_LENGTH = 400, 160  # 25 ms every 10 ms
# Mean and deviation of the log-mel values that BEATs was trained on.
FBANK_MEAN, FBANK_STD = 15.41663, 6.55582

# All layers of the official model hold the first one's table of position biases, each under its own name.
REPEATED_TABLE = r"layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$"

_ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new", "relu": "relu", "tanh": "tanh"}


class BeatsConfig(PreTrainedConfig):
    """The shape of a BEATs encoder, by the names of the ``cfg`` entry in Microsoft's checkpoints.

    ``BeatsConfig(**checkpoint["cfg"])`` takes such an entry; what only training needs (dropout and the like) is kept
    and has no effect. The defaults are those of BEATs_iter3+ (AS2M), fine-tuned.

    Args:
        input_patch_size: frames and mel bins of a patch.
        embed_dim: channels of a patch before ``encoder_embed_dim``.
        conv_bias: whether the patch projection has a bias.
        encoder_layers, encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads: of the transformer.
        activation_fn: one of gelu, gelu_accurate, gelu_fast, relu, tanh.
        layer_norm_first: normalise before attention and MLP instead of after their residual sums.
        deep_norm: scale the residuals as DeepNet does; not with ``layer_norm_first``.
        conv_pos, conv_pos_groups: kernel size and groups of the positional convolution.
        relative_position_embedding, num_buckets, max_distance: T5's bias on attention scores.
        gru_rel_pos: gate that bias by the query.
        finetuned_model: whether the checkpoint has a classifier (``predictor``, of ``predictor_class`` classes), which
            the features do not pass through.
        weight_norm_eps: added to the squared norm of the positional convolution's weights. 0 for Microsoft's code;
            VideoLLaMA2 trained with 1e-6.
    """

    model_type = "beats"
    attribute_map = {
        "hidden_size": "encoder_embed_dim",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_embed_dim",
    }

    input_patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    layer_norm_first: bool = False
    deep_norm: bool = True
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position_embedding: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    gru_rel_pos: bool = True
    finetuned_model: bool = True
    predictor_class: int = 527
    weight_norm_eps: float = 0.0
    initializer_range: float = 0.02


def fbank(waveform: np.ndarray) -> torch.Tensor:
    """Kaldi's log-mel filter bank as BEATs takes it.

    The same figures as ``torchaudio.compliance.kaldi.fbank(waveform * 2**15, num_mel_bins=128, frame_length=25,
    frame_shift=10, sample_frequency=16000)``: Povey window, pre-emphasis 0.97, mel bins from 20 Hz to 8 kHz, no frame
    beyond the end of the sound.

    Args:
        waveform: float [samples], mono, 16000 samples per second, in [-1, 1].

    Returns:
        float32 [frames, 128], one frame every 10 ms. Not yet normalised: `Beats` does that.

    Raises:
        ValueError: another shape, or less than one frame of 25 ms.
    """
    if waveform.ndim != 1 or waveform.size < FRAME_LENGTH:
        raise ValueError(f"a waveform must be [samples], at least {FRAME_LENGTH} of them, got {list(waveform.shape)}")
    mel = spectrogram(
        waveform.astype(np.float64) * 2**15,
        window_function(FRAME_LENGTH, "povey", periodic=False),
        frame_length=FRAME_LENGTH,
        hop_length=HOP_LENGTH,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=_mel_filters(),
        mel_floor=float(np.finfo(np.float32).eps),
        log_mel="log",
    )
    return torch.from_numpy(mel.T.astype(np.float32))


@functools.cache
def _mel_filters() -> np.ndarray:
    with warnings.catch_warnings():
        # The lowest of 128 mel bins are narrower than a frequency bin, and empty: in Kaldi's bank too.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=NUM_MEL_BINS,
            min_frequency=20.0,
            max_frequency=SAMPLING_RATE / 2,
            sampling_rate=SAMPLING_RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )


class Beats(PreTrainedModel):
    """The encoder: log-mel frames in, one vector per patch out, patches in order of time, then of frequency."""

    config_class = BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_features"
    _no_split_modules = ["BeatsLayer"]
    _keys_to_ignore_on_load_unexpected = [REPEATED_TABLE]

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__(config)
        if config.activation_fn not in _ACTIVATIONS:
            raise ValueError(f"activation_fn {config.activation_fn!r}: accepted are {', '.join(_ACTIVATIONS)}")
        if config.deep_norm and config.layer_norm_first:
            raise ValueError("deep_norm and layer_norm_first exclude each other")
        patch = config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, kernel_size=patch, stride=patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = None
        if config.embed_dim != config.encoder_embed_dim:
            self.post_extract_proj = nn.Linear(config.embed_dim, config.encoder_embed_dim)
        self.encoder = BeatsEncoder(config)
        self.predictor = nn.Linear(config.encoder_embed_dim, config.predictor_class) if config.finetuned_model else None
        self.register_load_state_dict_pre_hook(_drop_repeated_tables)
        self.post_init()

    def forward(
        self, input_features: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of log-mel frames.

        Args:
            input_features: [batch, frames, 128], as `fbank` gives them.
            padding_mask: bool [batch, samples or frames], true where there is no sound; None: sound everywhere.

        Returns:
            [batch, tokens, encoder_embed_dim] with tokens = (frames // patch) * (128 // patch), and the mask bool
            [batch, tokens] (None without ``padding_mask``).
        """
        frames = (input_features - FBANK_MEAN) / (2 * FBANK_STD)
        if padding_mask is not None:
            padding_mask = pooled_padding(padding_mask, frames.shape[1])
        hidden = self.patch_embedding(frames.to(self.patch_embedding.weight.dtype)[:, None])
        hidden = self.layer_norm(hidden.flatten(2).transpose(1, 2))
        if padding_mask is not None:
            padding_mask = pooled_padding(padding_mask, hidden.shape[1])
        if self.post_extract_proj is not None:
            hidden = self.post_extract_proj(hidden)
        return self.encoder(hidden, padding_mask), padding_mask

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionalConv):
            nn.init.normal_(module.weight_v, std=math.sqrt(4 / (module.weight_v.shape[-1] * module.weight_v.shape[0])))
            module.weight_g.copy_(module.weight_v.norm(dim=(0, 1), keepdim=True))
            nn.init.zeros_(module.bias)
        elif isinstance(module, BeatsAttention) and module.gated:
            nn.init.ones_(module.grep_a)


def _drop_repeated_tables(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    for name in [n for n in state_dict if n.startswith(prefix) and re.search(REPEATED_TABLE, n)]:
        del state_dict[name]


def pooled_padding(mask: torch.Tensor, length: int) -> torch.Tensor:
    """bool [batch, length] from a finer mask [batch, n]: true where all of n // length neighbours are padding."""
    each = mask.shape[1] // length
    return mask[:, : each * length].view(mask.shape[0], length, each).all(-1)


class BeatsEncoder(nn.Module):
    """Positional convolution and transformer layers."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.layer_norm_first = config.layer_norm_first
        # A list of one, for the name pos_conv.0 of the official model.
        self.pos_conv = nn.ModuleList([PositionalConv(config)])
        self.layers = nn.ModuleList([BeatsLayer(config, index) for index in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)

    def forward(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """[batch, tokens, channels] -> the same; ``padding_mask`` bool [batch, tokens]."""
        if padding_mask is not None:
            hidden = hidden.masked_fill(padding_mask[:, :, None], 0)
        hidden = hidden + self.pos_conv[0](hidden)
        if not self.layer_norm_first:
            hidden = self.layer_norm(hidden)
        position_bias = None  # the first layer's, for all
        for layer in self.layers:
            hidden, position_bias = layer(hidden, position_bias, padding_mask)
        return self.layer_norm(hidden) if self.layer_norm_first else hidden


class PositionalConv(nn.Module):
    """A grouped convolution over time with weights g * v / |v|, the norm taken per position in the kernel."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        channels, self.kernel, self.groups = config.encoder_embed_dim, config.conv_pos, config.conv_pos_groups
        self.eps = config.weight_norm_eps
        self.weight_g = nn.Parameter(torch.ones(1, 1, self.kernel))
        self.weight_v = nn.Parameter(torch.empty(channels, channels // self.groups, self.kernel).normal_())
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        direction = self.weight_v.float()
        direction = direction * torch.rsqrt(direction.pow(2).sum((0, 1), keepdim=True) + self.eps)
        weight = self.weight_g * direction.to(self.weight_v.dtype)
        length = hidden.shape[1]
        hidden = F.conv1d(hidden.mT, weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(hidden[..., :length].mT)  # an even kernel gives one position too many


class BeatsLayer(nn.Module):
    """Attention and MLP, normalised after each residual sum (or before, with ``layer_norm_first``)."""

    def __init__(self, config: BeatsConfig, index: int) -> None:
        super().__init__()
        channels = config.encoder_embed_dim
        self.self_attn = BeatsAttention(config, has_table=config.relative_position_embedding and index == 0)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.activation = ACT2FN[_ACTIVATIONS[config.activation_fn]]
        self.layer_norm_first = config.layer_norm_first
        self.residual_scale = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(
        self, hidden: torch.Tensor, position_bias: torch.Tensor | None, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The new hidden state, and the position bias [heads, tokens, tokens], which the first layer makes."""
        if position_bias is None:
            position_bias = self.self_attn.position_bias(hidden)
        if self.layer_norm_first:
            hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden), position_bias, padding_mask)
            return hidden + self.mlp(self.final_layer_norm(hidden)), position_bias
        attended = self.self_attn(hidden, position_bias, padding_mask)
        hidden = self.self_attn_layer_norm(hidden * self.residual_scale + attended)
        return self.final_layer_norm(hidden * self.residual_scale + self.mlp(hidden)), position_bias

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class BeatsAttention(nn.Module):
    """Bidirectional attention; the position bias on its scores may be gated by the query (Chi et al., 2106.16138)."""

    def __init__(self, config: BeatsConfig, has_table: bool) -> None:
        super().__init__()
        channels = config.encoder_embed_dim
        self.num_heads = config.encoder_attention_heads
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.gated = config.gru_rel_pos
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        self.relative_attention_bias = nn.Embedding(self.num_buckets, self.num_heads) if has_table else None
        if self.gated:
            self.grep_linear = nn.Linear(channels // self.num_heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def forward(
        self, hidden: torch.Tensor, position_bias: torch.Tensor | None, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """hidden [batch, tokens, channels], position_bias [heads, tokens, tokens]."""
        batch, length, _ = hidden.shape
        q, k, v = (
            projection(hidden).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = None
        if position_bias is not None:
            bias = position_bias[None].expand(batch, -1, -1, -1)
            if self.gated:
                a, b = self.grep_linear(q).view(batch, self.num_heads, length, 2, 4).sum(-1).sigmoid().chunk(2, dim=-1)
                bias = bias * (a * (b * self.grep_a - 1.0) + 2.0)
        if padding_mask is not None:
            bias = q.new_zeros(1) if bias is None else bias
            bias = bias.masked_fill(padding_mask[:, None, None, :], -torch.inf)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, length, -1))

    def position_bias(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[heads, tokens, tokens]: a learned bias per bucket of distance; None for a model without."""
        if self.relative_attention_bias is None:
            return None
        position = torch.arange(hidden.shape[1], device=hidden.device)
        return self.relative_attention_bias(self.bucket(position[None, :] - position[:, None])).permute(2, 0, 1)

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """T5's buckets: half for each direction; near distances one each, far ones logarithmically."""
        half = self.num_buckets // 2
        exact = half // 2
        size = distance.abs()
        # The order of operations is the official one: a bucket's edge must not move by a rounding.
        decades = torch.log(size.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (decades * (half - exact)).long()
        return (distance > 0).long() * half + torch.where(size < exact, size, far.clamp(max=half - 1))
