"""The vocabulary of the random-weight models: special tokens first, then one token per byte."""

from __future__ import annotations

# name in the tokenizer -> text. The texts are those of Qwen2.5-Omni, so that its processor finds its placeholders.
SPECIAL_TOKENS: dict[str, str] = {
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "im_end_token": "<|im_end|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "tts_text_start_token": "<|tts_text_start|>",
    "tts_text_end_token": "<|tts_text_end|>",
    "tts_text_pad_token": "<|tts_text_pad|>",
}

TOKEN_IDS: dict[str, int] = {name: index for index, name in enumerate(SPECIAL_TOKENS)}

FIRST_BYTE_TOKEN = len(SPECIAL_TOKENS)

# 13 special tokens and 256 bytes.
VOCAB_SIZE = FIRST_BYTE_TOKEN + 256


def token_of_byte(byte: int) -> int:
    """The id of the token that stands for one byte (0..255) of UTF-8 text."""
    if not 0 <= byte <= 255:
        raise ValueError(f"token_of_byte: a byte is 0..255, got {byte}")
    return FIRST_BYTE_TOKEN + byte
