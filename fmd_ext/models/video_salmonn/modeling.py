"""video-SALMONN (Sun et al., ICML 2024) from transformers' parts: InstructBLIP frames, Whisper, BEATs, Vicuna."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
    LlamaModel,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import can_return_tuple

from fmd_ext.compat import cache_kwargs, takes_cache
from fmd_ext.models.beats import Beats
from fmd_ext.models.generation import EmbeddingsGenerationMixin, refuse_beside_embeds

from .configuration import VideoSalmonnConfig
from .joining import JointQFormer

# Arguments of `forward` that bring a clip.
FEATURES = (
    "pixel_values",
    "num_frames",
    "qformer_input_ids",
    "qformer_attention_mask",
    "input_features",
    "beats_features",
    "num_beats_frames",
)


class VideoSalmonnForConditionalGeneration(PreTrainedModel, EmbeddingsGenerationMixin):
    """Answers questions about one clip per sample. For inference; the LoRA weights are merged into the decoder.

    Every audio-visual token mixes picture and sound (channel-wise fusion): see `branch_inputs`.
    """

    config_class = VideoSalmonnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "audio", "text")
    features = FEATURES
    _no_split_modules = ["LlamaDecoderLayer", "InstructBlipEncoderLayer", "InstructBlipQFormerLayer", "BeatsLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: VideoSalmonnConfig) -> None:
        super().__init__(config)
        self.vision_model = InstructBlipVisionModel(config.vision_config)
        # The official model's last norm, unlike those of the layers, is PyTorch's default.
        self.vision_model.post_layernorm.eps = 1e-5
        self.qformer = InstructBlipQFormerModel(config.qformer_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.speech_encoder = WhisperEncoder(config.speech_config)
        self.beats = Beats(config.beats_config)
        hidden = config.qformer_config.hidden_size
        self.speech_projection = nn.Linear(config.speech_config.d_model, hidden)
        self.beats_projection = nn.Linear(config.beats_config.encoder_embed_dim, hidden)
        self.joint_qformer = JointQFormer(config)
        text_hidden = config.text_config.hidden_size
        self.projector = nn.Linear(2 * config.joint_qformer_config.hidden_size, text_hidden)
        self.language_model = LlamaModel(config.text_config)
        self.lm_head = nn.Linear(text_hidden, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if module is self:
            nn.init.normal_(self.query_tokens, std=std)
        elif isinstance(module, JointQFormer):
            nn.init.normal_(module.query_tokens, std=std)
            nn.init.normal_(module.fine_query_tokens, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_frames: torch.LongTensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        beats_features: torch.Tensor | None = None,
        num_beats_frames: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits; `VideoSalmonnProcessor` makes the arguments.

        Args:
            input_ids: [batch, length], with placeholders where a clip's tokens go.
            attention_mask, position_ids, cache, inputs_embeds, labels, use_cache: as in any Llama.
            pixel_values: [batch, frames, 3, 224, 224]; num_frames [batch] says how many are real (0: no picture).
            qformer_input_ids, qformer_attention_mask: [batch, tokens], the question in BERT's vocabulary.
            input_features: [batch, 80, 3000], Whisper's log-mel window of 30 s.
            beats_features: [batch, frames, 128], BEATs' log-mel frames; num_beats_frames [batch] says how many are
                real (0: no sound).
            logits_to_keep: logits of so many last positions only (0: of all), or of those at its indices.

        Raises:
            ValueError: features that belong together are not all given, or another number of placeholders than the
                clips have tokens.
        """
        clip = {name: value for name, value in _clip_of(locals()).items() if value is not None}
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if clip:
                tokens = [self._tokens(*sample, ((1.0, 1.0),)) for sample in self._encode(**clip)]
                inputs_embeds = self._placed(input_ids, inputs_embeds[None], tokens)[0]
        else:
            refuse_beside_embeds(**clip)
        return self._answer(
            self.language_model,
            labels,
            logits_to_keep,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_kwargs(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @torch.no_grad()
    def branch_inputs(self, mask_scale: float, **call: Any) -> dict[str, Any]:
        """The arguments of a forward call with the clips' tokens made once per branch of fork-merge decoding.

        A modality is masked before it is joined with the other: its features, as the joint Q-Former gets them, are
        multiplied by ``mask_scale``. A clip without picture or without sound has tokens of the other alone, the same
        in both branches.

        Returns:
            The arguments, with ``inputs_embeds`` [batch, length, hidden] and ``branch_embeds`` [2, batch, length,
            hidden] (sound masked, picture masked) for the features; ``branch_embeds`` only where a clip has both.
            Without features in ``call``: the arguments as they are.
        """
        clip = {name: value for name, value in _clip_of(call).items() if value is not None}
        input_ids = call.get("input_ids")
        if not clip or input_ids is None:
            return call
        samples = self._encode(**clip)
        scales = ((1.0, mask_scale), (mask_scale, 1.0))
        tokens = [
            self._tokens(*s, scales if s[0] is not None and s[1] is not None else ((1.0, 1.0),) * 2) for s in samples
        ]
        embeds = self.get_input_embeddings()(input_ids)
        branches = self._placed(input_ids, embeds.expand(2, *embeds.shape), tokens)
        rest = {name: value for name, value in call.items() if name not in (*FEATURES, "input_ids")}
        rest["inputs_embeds"] = branches[0]
        if (input_ids == self.config.joint_token_id).any():
            rest["branch_embeds"] = branches
        return rest

    # --- from features to embeddings --------------------------------------------------------------------------------

    def _encode(
        self,
        pixel_values: torch.Tensor | None = None,
        num_frames: torch.LongTensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        beats_features: torch.Tensor | None = None,
        num_beats_frames: torch.LongTensor | None = None,
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Per sample: picture [frames, 32, hidden] and sound [half seconds, 25, 2 * hidden], None where it has none."""
        _need_all(pixel_values=pixel_values, num_frames=num_frames, qformer_input_ids=qformer_input_ids)
        _need_all(input_features=input_features, beats_features=beats_features, num_beats_frames=num_beats_frames)
        samples: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
        for b in range(len(pixel_values if pixel_values is not None else input_features)):
            video = audio = None
            given = (pixel_values, num_frames, qformer_input_ids, input_features, beats_features, num_beats_frames)
            if b and all(g is None or torch.equal(g[b], g[b - 1]) for g in given):
                samples.append(samples[-1])  # beams repeat a sample
                continue
            if pixel_values is not None and num_frames[b]:
                mask = None if qformer_attention_mask is None else qformer_attention_mask[b]
                video = self.encode_video(pixel_values[b, : num_frames[b]], qformer_input_ids[b], mask)
            if input_features is not None and num_beats_frames[b]:
                audio = self.encode_audio(input_features[b], beats_features[b, : num_beats_frames[b]])
            samples.append((video, audio))
        return samples

    def encode_video(
        self, frames: torch.Tensor, question_ids: torch.Tensor, question_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[frames, 3, 224, 224] and the question, [tokens] in BERT's vocabulary -> [frames, 32, hidden]."""
        picture = self.vision_model(pixel_values=frames.to(self.query_tokens.dtype)).last_hidden_state
        count = len(frames)
        if question_mask is None:
            question_mask = torch.ones_like(question_ids)
        mask = torch.cat([question_mask.new_ones(self.config.num_query_tokens), question_mask])
        out = self.qformer(
            input_ids=question_ids.expand(count, -1),
            attention_mask=mask.expand(count, -1),
            query_embeds=self.query_tokens.expand(count, -1, -1),
            encoder_hidden_states=picture,
        )
        return out.last_hidden_state[:, : self.config.num_query_tokens]

    def encode_audio(self, input_features: torch.Tensor, beats_features: torch.Tensor) -> torch.Tensor:
        """[80, 3000] for Whisper and [frames, 128] for BEATs -> [half seconds, 25, 2 * hidden], speech then sound."""
        speech = self.speech_encoder(input_features[None].to(self.query_tokens.dtype)).last_hidden_state
        sound = self.beats(beats_features[None])[0]
        places = speech.shape[1]
        if sound.shape[1] > places:
            raise ValueError(
                f"{beats_features.shape[0]} BEATs frames give {sound.shape[1]} tokens, more than the {places} of "
                "Whisper's window"
            )
        sound = nn.functional.pad(sound, (0, 0, 0, places - sound.shape[1]))
        audio = torch.cat([self.speech_projection(speech), self.beats_projection(sound)], dim=-1)
        return audio.view(-1, self.config.speech_tokens_per_frame, audio.shape[-1])

    def _tokens(
        self, video: torch.Tensor | None, audio: torch.Tensor | None, scales: tuple[tuple[float, float], ...]
    ) -> torch.Tensor:
        """Decoder embeddings [variants, tokens, hidden], one variant per pair of scales of picture and sound."""
        if video is None and audio is None:
            return self.projector.weight.new_zeros(len(scales), 0, self.projector.out_features)
        scaled = [
            None if features is None else torch.stack([features * scale for scale in column])
            for features, column in zip((video, audio), zip(*scales, strict=True), strict=True)
        ]
        return self.projector(self.joint_qformer(*scaled))

    def _placed(self, input_ids: torch.Tensor, embeds: torch.Tensor, tokens: list[torch.Tensor]) -> torch.Tensor:
        """A copy of [variants, batch, length, hidden] with each sample's tokens at its placeholders."""
        ids = self.config
        places = torch.isin(
            input_ids, input_ids.new_tensor([ids.video_token_id, ids.audio_token_id, ids.joint_token_id])
        )
        embeds = embeds.clone()
        if len(tokens) != len(input_ids):
            raise ValueError(f"the features are for {len(tokens)} samples, input_ids for {len(input_ids)}")
        for b, sample in enumerate(tokens):
            expected, found = sample.shape[1], int(places[b].sum())
            if expected != found:
                raise ValueError(
                    f"the clip of sample {b} has {expected} tokens, its input_ids hold {found} placeholders"
                )
            embeds[:, b, places[b]] = sample.to(embeds)
        return embeds


def _clip_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments.get(name) for name in FEATURES}


def _need_all(**features: Any) -> None:
    missing = [name for name, value in features.items() if value is None]
    if missing and len(missing) < len(features):
        given = ", ".join(name for name in features if name not in missing)
        raise ValueError(f"{given} without {', '.join(missing)}")
