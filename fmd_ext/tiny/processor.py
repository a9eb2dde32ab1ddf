"""Builds, without a download, the processors of the random-weight models: a byte tokenizer and the families' parts."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

from fmd_ext.tiny.model import NUM_MEL_BINS
from fmd_ext.tiny.qwen3_omni import PATCH_SIZE as QWEN3_PATCH_SIZE
from fmd_ext.tiny.vocabulary import SPECIAL_TOKENS, TOKEN_IDS, VOCAB_SIZE, token_of_byte

# Turns are <|im_start|>role\n ... <|im_end|>\n; media stand where they stand in the message, each between its markers.
CHAT_TEMPLATE = """\
{%- set markers = {
    'image': '<|vision_bos|><|IMAGE|><|vision_eos|>',
    'video': '<|vision_bos|><|VIDEO|><|vision_eos|>',
    'audio': '<|audio_bos|><|AUDIO|><|audio_eos|>',
} -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else markers[part['type']] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8 text after the special tokens; it merges nothing."""
    vocabulary = dict(zip(SPECIAL_TOKENS.values(), range(len(SPECIAL_TOKENS)), strict=True))
    vocabulary.update({character: token_of_byte(byte) for byte, character in enumerate(_byte_characters())})
    assert len(vocabulary) == VOCAB_SIZE

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS.values()])

    named = ("vision_bos", "vision_eos", "audio_bos", "audio_eos", "image", "video", "audio")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS["pad_token"],
        eos_token=SPECIAL_TOKENS["im_end_token"],
        extra_special_tokens={f"{name}_token": SPECIAL_TOKENS[f"{name}_token"] for name in named},
        padding_side="left",
        model_max_length=32768,
    )


def tiny_processor() -> Qwen2_5OmniProcessor:
    """The processor of tiny_thinker and tiny_omni: the class that real Qwen2.5-Omni models use, with small parts."""
    return Qwen2_5OmniProcessor(**_parts(patch_size=14))


def tiny_qwen3_processor() -> Qwen3OmniMoeProcessor:
    """The processor of tiny_qwen3_thinker and tiny_qwen3_omni: real Qwen3-Omni's class, with small parts."""
    return Qwen3OmniMoeProcessor(**_parts(patch_size=QWEN3_PATCH_SIZE))


def _parts(patch_size: int) -> dict[str, Any]:
    token_pixels = (2 * patch_size) ** 2
    return {
        "image_processor": Qwen2VLImageProcessor(
            patch_size=patch_size, min_pixels=4 * token_pixels, max_pixels=64 * token_pixels
        ),
        "video_processor": Qwen2VLVideoProcessor(patch_size=patch_size),
        "feature_extractor": WhisperFeatureExtractor(
            feature_size=NUM_MEL_BINS, chunk_length=30, return_attention_mask=True
        ),
        "tokenizer": byte_tokenizer(),
        "chat_template": CHAT_TEMPLATE,
    }


def unreadable_tokens() -> list[int]:
    """Ids that a demo should not print: special tokens but the end of a turn, and bytes beyond ASCII text."""
    readable = {token_of_byte(byte) for byte in range(32, 127)} | {TOKEN_IDS["im_end_token"]}
    return [token for token in range(VOCAB_SIZE) if token not in readable]


def _byte_characters() -> list[str]:
    """The printable character that tokenizers' byte-level step puts in the place of each byte 0..255.

    Bytes that are printable in Latin-1 stand for themselves, the others get the code points from 256 on in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in characters)
    characters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    assert set(characters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [characters[byte] for byte in range(256)]
