"""A small video-SALMONN: its configuration, its recorded official parameters, and its files in the official layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperModel,
)

from fmd_ext.models.loading import merge_lora
from fmd_ext.models.video_salmonn import VideoSalmonnConfig, VideoSalmonnForConditionalGeneration
from fmd_ext.models.video_salmonn.checkpoint import our_names
from paths import FIXTURES
from seeded_weights import seeded_tensor

RECORDED = np.load(FIXTURES / "video_salmonn.npz")
LORA_ALPHA = 8
BEATS = {
    "input_patch_size": 16,
    "embed_dim": 16,
    "conv_bias": False,
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 4,
    "layer_norm_first": False,
    "deep_norm": True,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "finetuned_model": True,
    "predictor_class": 7,
}
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}


def tiny_config() -> VideoSalmonnConfig:
    """4 decoder layers of 64 channels; frames of 28 pixels; two seconds of sound."""
    return VideoSalmonnConfig(
        text_config={
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
        },
        qformer_config={**BERT, "vocab_size": 51, "max_position_embeddings": 64},
        speech_config={
            "vocab_size": 60,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 8,
            "max_source_positions": 100,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        beats_config=BEATS,
        joint_qformer_config={**BERT, "cross_attention_frequency": 1, "encoder_hidden_size": 72},
    )


def official_parameters() -> dict[str, torch.Tensor]:
    """All parameters of the official model of this size, by their official names."""
    shapes = json.loads(str(RECORDED["tiny_parameters"]))
    return {name: torch.from_numpy(seeded_tensor(name, tuple(shape))) for name, shape in shapes.items()}


def tiny_model() -> VideoSalmonnForConditionalGeneration:
    """The port with the official model's recorded weights."""
    config = tiny_config()
    state = merge_lora(our_names(official_parameters(), config.vision_config.num_hidden_layers), LORA_ALPHA, "test")
    model = VideoSalmonnForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words of the tests, one token each."""
    words = ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", "<0x02>"]
    words += "USER: <Img> </Img> ASSISTANT: What is that sound ? Who sings".split()
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary.update({f"w{index}": index for index in range(len(words), vocab_size)})
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_official_folder(folder: Path) -> None:
    """The files that the authors name, with this model's weights."""
    parameters, config = official_parameters(), tiny_config()
    own = ("video_", "low_", "ln_video", "llama_proj", "speech_pre", "beats_pre")
    parts = folder / "pretrained_ckpt"
    for made in (folder / "MultiResQFormer", parts):
        made.mkdir(parents=True)

    def named(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}

    delta = {name: tensor for name, tensor in parameters.items() if name.startswith(own) or "lora_" in name}
    torch.save(delta, folder / "MultiResQFormer" / "pytorch_model_4_5001.pt")
    blip = {n: t for n, t in parameters.items() if n.startswith(("Qformer.", "ln_vision.")) or n == "query_tokens"}
    torch.save({"model": {**blip, "llm_proj.weight": torch.zeros(2, 2)}}, parts / "instruct_blip_vicuna13b_trimmed.pth")
    extra = {"blocks.2.norm1.weight": torch.zeros(32), "norm.weight": torch.zeros(32)}  # a block that is not used
    torch.save({**named("visual_encoder."), **extra}, parts / "eva_vit_g.pth")
    torch.save({"cfg": BEATS, "model": named("beats.")}, parts / "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt")
    whisper = WhisperModel(config.speech_config)
    whisper.encoder.load_state_dict(named("speech_encoder."))
    whisper.save_pretrained(parts / "whisper-large-v2")
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(parts / "whisper-large-v2")
    vicuna = LlamaForCausalLM(config.text_config)
    vicuna.load_state_dict({n: t for n, t in named("llama_model.base_model.model.").items() if "lora_" not in n})
    vicuna.save_pretrained(parts / "vicuna-13b-v1.5")
    tokenizer(97).save_pretrained(parts / "vicuna-13b-v1.5")
    bert = tokenizer(51)
    bert.pad_token = "</s>"
    bert.save_pretrained(parts / "bert-base-uncased")
    config.save_pretrained(folder)
