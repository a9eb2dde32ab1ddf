"""video-SALMONN 2+ (arXiv 2506.15220): Qwen2.5-VL that hears, the sound of a clip between the tokens of its frames.

Modules are named as in transformers' Qwen2.5-VL, with the sound's encoder beside the picture's; `checkpoint` says how
the published names map.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from fmd_ext.compat import cache_kwargs, takes_cache
from fmd_ext.models.loading import CompleteCheckpoints
from fmd_ext.models.windowed_sound import WindowedQFormer

from .configuration import VideoSalmonn2PlusAudioConfig, VideoSalmonn2PlusConfig
from .positions import ClipTokens, mrope_positions
from .processing import VideoSalmonn2PlusProcessor


class VideoSalmonn2PlusSound(WhisperEncoder):
    """From log-mel windows to tokens of the decoder: Whisper's encoder, a Q-Former over half seconds, a projection."""

    config_class = VideoSalmonn2PlusAudioConfig

    def __init__(self, config: VideoSalmonn2PlusAudioConfig) -> None:
        super().__init__(config)
        width = config.qformer_config.hidden_size
        self.qformer = WindowedQFormer(config.qformer_config)
        self.q_tokens = nn.Parameter(torch.zeros(1, config.query_length, width))
        self.audio_proj = nn.Linear(width, config.out_hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.q_tokens, std=self.config.qformer_config.initializer_range)

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """[windows, mel bins, 3000] -> [windows, tokens, out_hidden_size]."""
        states = super().forward(input_features.to(self.conv1.weight.dtype)).last_hidden_state
        return self.audio_proj(self.qformer(states, self.q_tokens, *self.config.window))


class VideoSalmonn2PlusModel(Qwen2_5_VLModel):
    """Qwen2.5-VL without the head, with an encoder of sound, and with positions that know of sound."""

    config_class = VideoSalmonn2PlusConfig

    def __init__(self, config: VideoSalmonn2PlusConfig) -> None:
        super().__init__(config)
        self.audio = VideoSalmonn2PlusSound._from_config(config.audio_config)
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As `Qwen2_5_VLModel`, with sound; what stands for what is read off ``input_ids``.

        Args:
            input_features: [batch, windows, mel bins, 3000]: see `VideoSalmonn2PlusForConditionalGeneration`.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if input_features is not None:
            inputs_embeds = self._with_sound(input_ids, inputs_embeds, input_features)
        cached = cache is not None and cache.get_seq_length() > 0
        if input_ids is not None and position_ids is None and not cached:
            kwargs |= self.position_inputs(input_ids, kwargs.get("video_grid_thw"))
        return super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **cache_kwargs(cache),
            **kwargs,
        )

    def position_inputs(self, input_ids: torch.Tensor, video_grid_thw: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What `Qwen2_5_VLModel` wants to be given before it computes positions; of sound alone, too.

        mm_token_type_ids int32 [batch, length]: 0 text, 1 image, 2 video, 3 sound; video_grid_thw, if need be empty.
        """
        ids = self.config
        types = torch.zeros_like(input_ids, dtype=torch.int32)
        for number, id in enumerate((ids.image_token_id, ids.video_token_id, ids.audio_token_id), start=1):
            types.masked_fill_(input_ids == id, number)
        grids = input_ids.new_zeros(0, 3) if video_grid_thw is None else video_grid_thw
        return {"mm_token_type_ids": types, "video_grid_thw": grids}

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [3, batch, length] of prompts, and [batch, 1] what to add to later places to get theirs.

        Which way they are counted is the configuration's ``mrope_positions``; see `positions`.
        """
        config = self.config
        tokens = ClipTokens(
            config.image_token_id, config.video_token_id, config.audio_token_id, config.vision_start_token_id
        )
        images, videos = (iter(() if grid is None else grid.cpu()) for grid in (image_grid_thw, video_grid_thw))
        seconds = iter(() if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist())
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
        deltas = []
        for row, ids in enumerate(input_ids.cpu()):
            real = slice(None) if attention_mask is None else attention_mask[row].cpu().bool()
            own = mrope_positions(
                ids[real],
                tokens,
                config.mrope_positions,
                images,
                videos,
                seconds,
                config.vision_config.spatial_merge_size,
            )
            positions[:, row, real] = own
            deltas.append(int(own.max()) + 1 - own.shape[1])
        return positions.to(input_ids.device), torch.tensor(deltas, device=input_ids.device)[:, None]

    def compute_3d_position_ids(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> torch.Tensor | None:
        """As `Qwen2_5_VLModel`; behind a cache, of the new positions only, where an attention mask is for all."""
        positions = super().compute_3d_position_ids(inputs_embeds=inputs_embeds, **kwargs)
        return positions if positions is None else positions[..., -inputs_embeds.shape[1] :]

    def _with_sound(
        self, input_ids: torch.Tensor | None, embeds: torch.Tensor, input_features: torch.Tensor
    ) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("input_features need input_ids, which say where the sound goes")
        places = input_ids == self.config.audio_token_id
        each, counts = self.config.audio_config.num_tokens, places.sum(1)
        windows = torch.arange(input_features.shape[1], device=counts.device)
        if len(input_features) != len(counts) or (counts % each).any() or counts.max() > each * len(windows):
            raise ValueError(
                f"the prompts hold {counts.tolist()} tokens of sound, input_features {len(windows)} windows for each "
                f"of {len(input_features)} samples, of {each} tokens each"
            )
        heard = input_features[(windows < counts[:, None] // each).to(input_features.device)]
        if not len(heard):
            return embeds
        sound = self.audio(heard).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(places[..., None].to(embeds.device), sound)


def _with_argument(function: Any, name: str) -> inspect.Signature:
    signature = inspect.signature(function)
    *own, rest = signature.parameters.values()
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*own, added, rest])


class VideoSalmonn2PlusForConditionalGeneration(CompleteCheckpoints, Qwen2_5_VLForConditionalGeneration):
    """Answers questions about clips; `VideoSalmonn2PlusProcessor` makes the arguments."""

    config_class = VideoSalmonn2PlusConfig
    processor_class = VideoSalmonn2PlusProcessor  # that of published folders, which name Qwen2.5-VL's
    input_modalities = ("image", "video", "audio", "text")
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "VideoSalmonn2PlusSound"]
    # A table that the official Q-Former keeps and no feature passes through.
    _keys_to_ignore_on_load_unexpected = [r"qformer\.bert\.embeddings\.position_ids$"]

    def __init__(self, config: VideoSalmonn2PlusConfig) -> None:
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)  # its own would make a model without sound
        self.model = VideoSalmonn2PlusModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(self, *args: Any, input_features: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As `Qwen2_5_VLForConditionalGeneration`, with sound.

        Args:
            input_features: [batch, windows, mel bins, 3000], 30 s each. A sample with fewer windows, by the number
                of its placeholders, has them first; what follows is not looked at.

        Raises:
            ValueError: placeholders and features, or placeholders and grids, do not match.
        """
        return super().forward(*args, input_features=input_features, **kwargs)

    # `generate` and the patch look the arguments up, and transformers' versions differ in them.
    forward.__signature__ = _with_argument(Qwen2_5_VLForConditionalGeneration.forward, "input_features")

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if ids.dim() == 2 and not ids.is_floating_point():
            model_kwargs = {**model_kwargs, **self.model.position_inputs(ids, model_kwargs.get("video_grid_thw"))}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
