"""Random-weight Qwen3-Omni models of a few megabytes, for tests. What they say means nothing."""

from __future__ import annotations

import torch
from transformers import (
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from fmd_ext.lab.tiny.model import INITIALIZER_RANGE, NUM_MEL_BINS, SPEAKERS, set_generation_tokens
from fmd_ext.lab.tiny.vocabulary import TOKEN_IDS, VOCAB_SIZE, token_of_byte

PATCH_SIZE = 16  # of the picture; Qwen2.5-Omni's is 14
CODEC_VOCAB = 1100  # of the talker: the full model never lets it say the last 1024 but for the end


def tiny_qwen3_thinker_config(
    *, num_layers: int = 4, hidden_size: int = 256, num_heads: int = 4, num_kv_heads: int = 2
) -> Qwen3OmniMoeThinkerConfig:
    """The configuration of a tiny thinker: four experts of which two work, added features of two depths."""
    head_dim = hidden_size // num_heads
    spatial = head_dim // 6
    ids = {
        "audio_token_id": TOKEN_IDS["audio_token"],
        "image_token_id": TOKEN_IDS["image_token"],
        "video_token_id": TOKEN_IDS["video_token"],
        "audio_start_token_id": TOKEN_IDS["audio_bos_token"],
        "audio_end_token_id": TOKEN_IDS["audio_eos_token"],
        "vision_start_token_id": TOKEN_IDS["vision_bos_token"],
        "vision_end_token_id": TOKEN_IDS["vision_eos_token"],
        "user_token_id": token_of_byte(ord("u")),
    }
    return Qwen3OmniMoeThinkerConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "head_dim": head_dim,
            "intermediate_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
            },
            "pad_token_id": TOKEN_IDS["pad_token"],
            "eos_token_id": TOKEN_IDS["im_end_token"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH_SIZE,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": INITIALIZER_RANGE,
        },
        audio_config={
            "num_mel_bins": NUM_MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "d_model": 64,
            "output_dim": hidden_size,
            "downsample_hidden_size": 16,
            "initializer_range": INITIALIZER_RANGE,
        },
        position_id_per_seconds=13,
        initializer_range=INITIALIZER_RANGE,
        **ids,
    )


def tiny_qwen3_omni_config(**thinker_dims: int) -> Qwen3OmniMoeConfig:
    """The configuration of the full model: thinker (dims as in tiny_qwen3_thinker_config), talker, speech decoder."""
    thinker = tiny_qwen3_thinker_config(**thinker_dims)
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    dims = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "initializer_range": INITIALIZER_RANGE,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    talker = {
        "text_config": {
            "vocab_size": CODEC_VOCAB,
            "shared_expert_intermediate_size": 64,
            "rope_parameters": {**rope, "mrope_section": [6, 5, 5]},
            **dims,
            **experts,
        },
        "code_predictor_config": {"vocab_size": 64, "num_code_groups": 4, "rope_parameters": rope, **dims},
        "num_code_groups": 4,
        "thinker_hidden_size": thinker.text_config.hidden_size,
        "accept_hidden_layer": 2,
        # The last codes that the talker may say, and the one that ends its speech.
        "codec_eos_token_id": 1099,
        "codec_nothink_id": 70,
        "codec_think_bos_id": 71,
        "codec_think_eos_id": 72,
        "codec_pad_id": 73,
        "codec_bos_id": 74,
        "spatial_merge_size": 2,
        "speaker_id": {name.lower(): 60 + index for index, name in enumerate(SPEAKERS)},
        **{name: getattr(thinker, name) for name in ("audio_token_id", "image_token_id", "video_token_id")},
        **{name: getattr(thinker, name) for name in ("audio_start_token_id", "vision_start_token_id")},
    }
    code2wav = {
        "codebook_size": 64,
        "num_quantizers": 4,
        "decoder_dim": 32,
        "upsample_rates": [2, 2],
        "upsampling_ratios": [2],
        "rope_parameters": rope,
        **dims,
        "num_key_value_heads": 2,
    }
    return Qwen3OmniMoeConfig(
        thinker_config=thinker.to_dict(),
        talker_config=talker,
        code2wav_config=code2wav,
        enable_audio_output=True,
        im_start_token_id=TOKEN_IDS["im_start_token"],
        im_end_token_id=TOKEN_IDS["im_end_token"],
        tts_pad_token_id=TOKEN_IDS["tts_text_pad_token"],
        tts_bos_token_id=TOKEN_IDS["tts_text_start_token"],
        tts_eos_token_id=TOKEN_IDS["tts_text_end_token"],
        # The byte tokenizer has no word for a role: its first letter stands for it.
        system_token_id=token_of_byte(ord("s")),
        user_token_id=token_of_byte(ord("u")),
        assistant_token_id=token_of_byte(ord("a")),
    )


def tiny_qwen3_thinker(seed: int = 0, **dims: int) -> Qwen3OmniMoeThinkerForConditionalGeneration:
    """A random-weight thinker in eval mode, float32 on the CPU. dims: see tiny_qwen3_thinker_config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3OmniMoeThinkerForConditionalGeneration(tiny_qwen3_thinker_config(**dims))
    set_generation_tokens(model)
    return model.eval()


def tiny_qwen3_omni(seed: int = 0, **thinker_dims: int) -> Qwen3OmniMoeForConditionalGeneration:
    """The full random-weight model, speech out included, in eval mode, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3OmniMoeForConditionalGeneration(tiny_qwen3_omni_config(**thinker_dims))
    set_generation_tokens(model.thinker)
    return model.eval()
