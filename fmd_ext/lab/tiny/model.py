"""Random-weight Qwen2.5-Omni models of a few megabytes, for tests and for the demo. What they say means nothing."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from fmd_ext.lab.tiny.vocabulary import TOKEN_IDS, VOCAB_SIZE

NUM_MEL_BINS = 32
MEL_DIM = 16  # of the speech decoder, not of the audio tower
SPEAKER_DIM = 16
SPEAKERS = ("Chelsie", "Ethan")

# transformers initialises with a deviation of 0.02, made for thousands of channels. At this width that would leave
# attention flat and the layers without effect, and forking would change nothing that a test could see.
INITIALIZER_RANGE = 0.08


def tiny_thinker_config(
    *,
    num_layers: int = 4,
    hidden_size: int = 256,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 256,
    max_position_embeddings: int = 32768,
    vocab_size: int = VOCAB_SIZE,
    encoder_size: int = 64,
    audio_window: int = 100,
) -> Qwen2_5OmniThinkerConfig:
    """The configuration of a tiny thinker: head_dim is hidden_size / num_heads, which must be an even whole number.

    Args:
        encoder_size: channels of the picture's and of the sound's encoder, two heads each.
        audio_window: half the mel frames (of 10 ms) that the sound's encoder sees at once.
    """
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ValueError(f"hidden_size {hidden_size} is no even multiple of num_heads {num_heads}")
    head_dim = hidden_size // num_heads
    temporal = head_dim // 8
    spatial = (head_dim // 2 - temporal) // 2
    rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        # Rotary frequencies (head_dim / 2 of them) given to time, height and width.
        "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
    }
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": max_position_embeddings,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": rope_parameters,
            "pad_token_id": TOKEN_IDS["pad_token"],
            "eos_token_id": TOKEN_IDS["im_end_token"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": encoder_size,
            "intermediate_size": 2 * encoder_size,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [1],
            "initializer_range": INITIALIZER_RANGE,
        },
        audio_config={
            "num_mel_bins": NUM_MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 2 * encoder_size,
            "d_model": encoder_size,
            "n_window": audio_window,
            "output_dim": hidden_size,
            "initializer_range": INITIALIZER_RANGE,
        },
        audio_token_index=TOKEN_IDS["audio_token"],
        image_token_index=TOKEN_IDS["image_token"],
        video_token_index=TOKEN_IDS["video_token"],
        audio_start_token_id=TOKEN_IDS["audio_bos_token"],
        audio_end_token_id=TOKEN_IDS["audio_eos_token"],
        vision_start_token_id=TOKEN_IDS["vision_bos_token"],
        vision_end_token_id=TOKEN_IDS["vision_eos_token"],
        user_token_id=TOKEN_IDS["im_start_token"],
        initializer_range=INITIALIZER_RANGE,
    )


def tiny_omni_config(**thinker_dims: int) -> Qwen2_5OmniConfig:
    """The configuration of the full model: thinker (dims as in tiny_thinker_config), talker and speech decoder."""
    thinker = tiny_thinker_config(**thinker_dims)
    text = thinker.text_config
    talker = {
        "vocab_size": 64,
        "embedding_size": text.hidden_size,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]},
        "initializer_range": INITIALIZER_RANGE,
        "tts_text_start_token_id": TOKEN_IDS["tts_text_start_token"],
        "tts_text_end_token_id": TOKEN_IDS["tts_text_end_token"],
        "tts_text_pad_token_id": TOKEN_IDS["tts_text_pad_token"],
        # The last codes of the talker's own vocabulary.
        "tts_codec_pad_token_id": 60,
        "tts_codec_start_token_id": 61,
        "tts_codec_end_token_id": 62,
        "tts_codec_mask_token_id": 63,
        "audio_token_index": thinker.audio_token_index,
        "image_token_index": thinker.image_token_index,
        "video_token_index": thinker.video_token_index,
        "audio_start_token_id": thinker.audio_start_token_id,
        "audio_end_token_id": thinker.audio_end_token_id,
        "vision_start_token_id": thinker.vision_start_token_id,
        "vision_end_token_id": thinker.vision_end_token_id,
    }
    token2wav = {
        "dit_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "emb_dim": 16,
            "block_size": 8,
            "look_ahead_layers": [1],
            "look_backward_layers": [0],
            "num_embeds": 64,
            "mel_dim": MEL_DIM,
            "enc_emb_dim": SPEAKER_DIM,
            "enc_dim": 8,
            "enc_channels": [16, 16, 16, 16, 48],
            "enc_attention_channels": 8,
            "enc_se_channels": 8,
        },
        "bigvgan_config": {
            "mel_dim": MEL_DIM,
            "upsample_initial_channel": 16,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
            "upsample_rates": [5, 3],
            "upsample_kernel_sizes": [11, 7],
        },
    }
    return Qwen2_5OmniConfig(
        thinker_config=thinker.to_dict(), talker_config=talker, token2wav_config=token2wav, enable_audio_output=True
    )


def tiny_thinker(seed: int = 0, **dims: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A random-weight thinker in eval mode, float32 on the CPU. dims: see tiny_thinker_config.

    The same seed and dims give the same weights; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_thinker_config(**dims))
    set_generation_tokens(model)
    return model.eval()


def tiny_omni(seed: int = 0, **thinker_dims: int) -> Qwen2_5OmniForConditionalGeneration:
    """The full random-weight model, speech out included, in eval mode, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniForConditionalGeneration(tiny_omni_config(**thinker_dims))
    set_generation_tokens(model.thinker)
    model.speaker_map = speaker_map(seed)
    return model.eval()


def speaker_map(seed: int = 0) -> dict[str, dict[str, object]]:
    """Random voices in the form that the speech decoder expects.

    Per speaker: ``cond`` float32 [1, SPEAKER_DIM], ``ref_mel`` float32 [1, frames, MEL_DIM], ``bos_token`` int.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            "cond": torch.randn(1, SPEAKER_DIM, generator=generator),
            "ref_mel": torch.randn(1, 20, MEL_DIM, generator=generator),
            "bos_token": TOKEN_IDS["tts_text_start_token"],
        }
        for name in SPEAKERS
    }


def set_generation_tokens(thinker: PreTrainedModel) -> None:
    """Padding and end of turn, which a downloaded model's generation settings would name."""
    thinker.generation_config.pad_token_id = TOKEN_IDS["pad_token"]
    thinker.generation_config.eos_token_id = TOKEN_IDS["im_end_token"]
