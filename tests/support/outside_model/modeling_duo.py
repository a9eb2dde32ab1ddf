"""A made-up model as a checkpoint brings it along (``trust_remote_code``): transformers and fmd_ext do not know it.

Like MiniCPM-o and its kin it is an outer module with encoders, whose language model is called through
``inputs_embeds``, in ``forward`` and in a ``generate`` of its own, which returns the answer alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM


class DuoConfig(PreTrainedConfig):
    model_type = "duo"
    sub_configs = {"text_config": Qwen2Config}

    text_config: dict | PreTrainedConfig | None = None
    patch_values: int = 48
    sound_values: int = 40
    seen_token_id: int = 1
    heard_token_id: int = 2

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            self.text_config = Qwen2Config(**self.text_config)
        super().__post_init__(**kwargs)


class DuoModel(PreTrainedModel):
    config_class = DuoConfig

    def __init__(self, config):
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.eyes = nn.Sequential(nn.Linear(config.patch_values, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.ears = nn.Sequential(nn.Linear(config.sound_values, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def _embed(self, input_ids, patches, sounds):
        """[batch, length] -> [batch, length, hidden]; patches [seen, values] and sounds [heard, values] in order."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        for token, values, encoder in (
            (self.config.seen_token_id, patches, self.eyes),
            (self.config.heard_token_id, sounds, self.ears),
        ):
            if values is not None:
                embeds = embeds.masked_scatter((input_ids == token)[..., None], encoder(values.to(embeds.dtype)))
        return embeds

    def forward(self, input_ids, attention_mask=None, patches=None, sounds=None, **kwargs):
        return self.llm(inputs_embeds=self._embed(input_ids, patches, sounds), attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, patches=None, sounds=None, **kwargs):
        embeds = self._embed(input_ids, patches, sounds)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
