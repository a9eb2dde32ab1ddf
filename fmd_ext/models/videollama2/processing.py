"""From clips and prompts to VideoLLaMA2's inputs, as the official code makes them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, ProcessorMixin, SiglipImageProcessorPil

from fmd_ext.inputs.chat import check_sampling_rate
from fmd_ext.inputs.frames import middles
from fmd_ext.inputs.media import Clip
from fmd_ext.models.batching import padded_prompts, stacked
from fmd_ext.models.beats import NUM_MEL_BINS, SAMPLING_RATE, fbank

VIDEO, AUDIO = "<video>", "<audio>"  # placeholders in a prompt

SECONDS_HEARD = 30
WINDOWS, WINDOW_SECONDS = 8, 2  # what is heard of a clip with picture

# The Mistral models were trained with this system prompt (Llama 2's), the Qwen2 ones with that of Qwen2's template.
MISTRAL_SYSTEM_PROMPT = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information.\n<</SYS>>"
)


class VideoLlama2Processor(ProcessorMixin):
    """Tokenizer, image processor and filter bank of a VideoLLaMA2 model; a `fmd_ext.inputs.chat.ClipProcessor`.

    ``from_pretrained`` needs the model's configuration and tokenizer only: published folders hold nothing else.

    Args:
        image_processor: of SigLIP or CLIP, working on PIL images as the official code does.
        tokenizer: of the text decoder, with its chat template.
        num_frames, num_video_tokens: frames of a clip, and the positions they take.
        patch_size: frames and bins of a BEATs patch; None for a model without audio tower.
        video_token_id, audio_token_id: the placeholders' ids.
        system_prompt: the one that the model was trained with, where the chat template does not bring it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_frames: int = 16,
        num_video_tokens: int = 1352,
        patch_size: int | None = 16,
        video_token_id: int = 152062,
        audio_token_id: int = 152063,
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.num_frames, self.num_video_tokens, self.patch_size = num_frames, num_video_tokens, patch_size
        self.video_token_id, self.audio_token_id = video_token_id, audio_token_id
        self.system_prompt = system_prompt

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> VideoLlama2Processor:
        """From the configuration and the tokenizer in a model's folder or repository."""
        config = AutoConfig.from_pretrained(source, **kwargs)
        return cls.from_config(config, AutoTokenizer.from_pretrained(source, **kwargs))

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any) -> VideoLlama2Processor:
        """The processor that belongs to a model's configuration."""
        size = config.vision_config.image_size
        if config.vision_config.model_type == "clip_vision_model":
            crop = {"height": size, "width": size}
            image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
        else:
            image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
        return cls(
            image_processor,
            tokenizer,
            num_frames=config.num_frames,
            num_video_tokens=config.num_video_tokens,
            patch_size=config.audio_config.input_patch_size if config.audio_config is not None else None,
            video_token_id=config.video_token_id,
            audio_token_id=config.audio_token_id,
            system_prompt=MISTRAL_SYSTEM_PROMPT if "mistral" in config.model_type else None,
        )

    @property
    def clip_arguments(self) -> dict[str, Any]:
        """How `load_clip` reads a clip: the official choice of frames, at full size, at BEATs' sampling rate."""
        return {"num_frames": self.num_frames, "sampling_rate": SAMPLING_RATE, "max_pixels": 2**30}

    def render(self, clips: Sequence[Clip], question: str, system_prompt: str | None = None) -> str:
        """The prompt, by the tokenizer's chat template, with the placeholders of the clips before the question."""
        if VIDEO in question or AUDIO in question:
            raise ValueError(f"the question contains {VIDEO} or {AUDIO}, which stand for clips: {question!r}")
        parts = [VIDEO * (clip.frames is not None) + AUDIO * (clip.audio is not None) for clip in clips]
        messages = [{"role": "user", "content": "\n".join([*parts, question]) if parts else "\n" + question}]
        if (system_prompt or self.system_prompt) is not None:
            messages.insert(0, {"role": "system", "content": system_prompt or self.system_prompt})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def prepare_clips(
        self,
        conversations: Sequence[tuple[Sequence[Clip], str]],
        *,
        use_audio_in_video: bool = False,
        system_prompt: str | None = None,
        frame_pixels: tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `fmd_ext.inputs.chat.prepare_batch`. Neither interleaving nor frames of another size."""
        if use_audio_in_video:
            raise ValueError("VideoLLaMA2 hears a clip after it has seen it: it cannot interleave picture and sound")
        if frame_pixels is not None:
            raise ValueError("VideoLLaMA2 sees frames of one size only: it takes no number of pixels per frame")
        clips = [list(own) for own, _ in conversations]
        texts = [self.render(own, question, system_prompt) for own, question in conversations]
        return self(texts, clips)

    def __call__(self, text: Sequence[str], clips: Sequence[Sequence[Clip]]) -> dict[str, torch.Tensor]:
        """The inputs of prompts with their clips, padded on the left.

        Args:
            text: prompts, with `<video>` for each picture and `<audio>` for each sound of their clips, in order.
            clips: those of each prompt.

        Returns:
            input_ids and attention_mask int64 [batch, length]; with any picture pixel_values_videos float32
            [batch, clips, num_frames, 3, height, width], with any sound input_features float32
            [batch, clips, 2998, 128]. A sample with fewer clips than another has zeros behind its own.

        Raises:
            ValueError: placeholders that do not match the clips, sound for a model that does not hear, a sampling
                rate other than 16 kHz, text that is tokenized to a placeholder's id.
        """
        pictures = [[self._frames(clip.frames) for clip in own if clip.frames is not None] for own in clips]
        sounds = [[self._sound(clip) for clip in own if clip.audio is not None] for own in clips]
        rows = [self._ids(*sample) for sample in zip(text, pictures, sounds, strict=True)]
        inputs = padded_prompts(self.tokenizer, rows)
        if any(pictures):
            inputs["pixel_values_videos"] = _stacked(pictures)
        if any(sounds):
            inputs["input_features"] = _stacked(sounds)
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values_videos", "input_features"]

    def _ids(self, text: str, pictures: list[torch.Tensor], sounds: list[torch.Tensor]) -> list[int]:
        placeholders = {VIDEO: self.video_token_id, AUDIO: self.audio_token_id}
        counts = {VIDEO: self.num_video_tokens}
        if sounds:
            counts[AUDIO] = (sounds[0].shape[0] // self.patch_size) * (NUM_MEL_BINS // self.patch_size)
        ids: list[int] = []
        found = {VIDEO: 0, AUDIO: 0}
        # Tokenized piece by piece, so that no token reaches across a placeholder.
        for piece in re.split(f"({VIDEO}|{AUDIO})", text):
            if piece in found:
                found[piece] += 1
                ids += [placeholders[piece]] * counts.get(piece, 1)
                continue
            own = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            if set(own) & set(placeholders.values()):
                raise ValueError(f"the prompt contains text that stands for a placeholder: {piece!r}")
            ids += own
        if found != {VIDEO: len(pictures), AUDIO: len(sounds)}:
            raise ValueError(
                f"the prompt has {found[VIDEO]} {VIDEO} and {found[AUDIO]} {AUDIO}, its clips have {len(pictures)} "
                f"pictures and {len(sounds)} sounds"
            )
        return ids

    def _frames(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [n, height, width, 3] -> float32 [num_frames, 3, height, width], normalised."""
        chosen = [frames[index] for index in middles(len(frames), self.num_frames)]
        return self.image_processor(images=chosen, return_tensors="pt")["pixel_values"]

    def _sound(self, clip: Clip) -> torch.Tensor:
        """float32 [2998, 128]: the filter bank of 30 s, silent behind the sound, rounded to bfloat16 as in training."""
        if self.patch_size is None:
            raise ValueError("this model has no audio tower: give it clips without sound (audio=None)")
        check_sampling_rate(clip, SAMPLING_RATE)
        wave = clip.audio if clip.frames is None else spread_windows(clip.audio)
        limit = SECONDS_HEARD * SAMPLING_RATE
        if len(wave) > limit:
            heard = len(wave) / SAMPLING_RATE
            warnings.warn(f"the model hears only the first {SECONDS_HEARD} s of {heard:.1f} s of sound", stacklevel=5)
        # Files were decoded to 16 bit samples.
        wave = np.clip(np.round(wave[:limit] * 2.0**15), -(2**15), 2**15 - 1) / 2.0**15
        frames = fbank(np.pad(wave, (0, limit - len(wave))))
        return frames.to(torch.bfloat16).float()


def spread_windows(wave: np.ndarray) -> np.ndarray:
    """What VideoLLaMA2 hears of a clip: 8 windows of 2 s, one behind the other, their starts evenly spread.

    The last window starts an eighth before the last possible start: that is how the official sampler
    (pytorchvideo's, version 0.1.5) counts. Of less than 2 s it takes all there is, 8 times.

    Args:
        wave: [samples], 16000 per second.

    Returns:
        [up to 16 s of samples].
    """
    return np.concatenate([wave[begin:end] for begin, end in window_cuts(len(wave))])


def window_cuts(samples: int) -> list[tuple[int, int]]:
    """First and last-but-one sample of each window of a sound of so many samples."""
    last_start = Fraction(max(samples / SAMPLING_RATE - WINDOW_SECONDS, 0))
    starts = [last_start / WINDOWS * index for index in range(WINDOWS)]
    return [(int(start * SAMPLING_RATE), int((start + WINDOW_SECONDS) * SAMPLING_RATE)) for start in starts]


def _stacked(samples: list[list[torch.Tensor]]) -> torch.Tensor:
    """[batch, most clips of a sample, ...], zeros where a sample has fewer."""
    return stacked([torch.stack(own) if own else None for own in samples])
