"""Builds, without a download, the processors of the random-weight models: a byte tokenizer and the families' parts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

from fmd_ext.lab.tiny.model import NUM_MEL_BINS
from fmd_ext.lab.tiny.qwen3_omni import PATCH_SIZE as QWEN3_PATCH_SIZE
from fmd_ext.lab.tiny.vocabulary import SPECIAL_TOKENS, TOKEN_IDS, VOCAB_SIZE, token_of_byte

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


def byte_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8 text after the special tokens.

    Every word of ``texts`` gets a token of its own behind them; without texts nothing is merged.
    """
    vocabulary = dict(zip(SPECIAL_TOKENS.values(), range(len(SPECIAL_TOKENS)), strict=True))
    vocabulary.update({character: token_of_byte(byte) for byte, character in enumerate(_byte_characters())})
    assert len(vocabulary) == VOCAB_SIZE
    merges = _word_merges(texts)
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
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


def tiny_processor(
    texts: Iterable[str] = (), frame_pixels: int | None = None, audio_seconds: int = 30
) -> Qwen2_5OmniProcessor:
    """The processor of tiny_thinker and tiny_omni: the class that real Qwen2.5-Omni models use, with small parts.

    Args:
        texts: see ``byte_tokenizer``.
        frame_pixels: video frames are scaled to about so many; None: as Qwen2.5-Omni's own processor does.
        audio_seconds: sound is padded to so many seconds, and cut there.
    """
    return Qwen2_5OmniProcessor(**_parts(14, texts, frame_pixels, audio_seconds))


def tiny_qwen3_processor() -> Qwen3OmniMoeProcessor:
    """The processor of tiny_qwen3_thinker and tiny_qwen3_omni: real Qwen3-Omni's class, with small parts."""
    return Qwen3OmniMoeProcessor(**_parts(QWEN3_PATCH_SIZE))


def _parts(
    patch_size: int, texts: Iterable[str] = (), frame_pixels: int | None = None, audio_seconds: int = 30
) -> dict[str, Any]:
    token_pixels = (2 * patch_size) ** 2
    size = {} if frame_pixels is None else {"size": {"shortest_edge": frame_pixels, "longest_edge": frame_pixels}}
    return {
        "image_processor": Qwen2VLImageProcessor(
            patch_size=patch_size, min_pixels=4 * token_pixels, max_pixels=64 * token_pixels
        ),
        "video_processor": Qwen2VLVideoProcessor(patch_size=patch_size, **size),
        "feature_extractor": WhisperFeatureExtractor(
            feature_size=NUM_MEL_BINS, chunk_length=audio_seconds, return_attention_mask=True
        ),
        "tokenizer": byte_tokenizer(texts),
        "chat_template": CHAT_TEMPLATE,
    }


def unreadable_tokens() -> list[int]:
    """Ids that a demo should not print: special tokens but the end of a turn, and bytes beyond ASCII text."""
    readable = {token_of_byte(byte) for byte in range(32, 127)} | {TOKEN_IDS["im_end_token"]}
    return [token for token in range(VOCAB_SIZE) if token not in readable]


def _word_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word (with the space before it) of ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=10_000, show_progress=False))
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


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
