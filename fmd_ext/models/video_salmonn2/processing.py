"""From clips and questions to the inputs of video-SALMONN 2, as its official code prepares them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin, SiglipImageProcessorPil, WhisperFeatureExtractor

from fmd_ext.inputs.chat import SYSTEM_PROMPT, check_sampling_rate
from fmd_ext.inputs.media import Clip
from fmd_ext.models.batching import padded_prompts, stacked
from fmd_ext.models.windowed_sound import log_mel_windows

IMAGE = "<image>"  # stands for a clip in a prompt
TOKENS_PER_SECOND = 50  # of sound, as the official code believes when it divides them among frames
LARGEST_READ = 1920 * 1080  # pixels; frames of larger pictures are scaled down when they are read


class VideoSalmonn2Processor(ProcessorMixin):
    """A `fmd_ext.inputs.chat.ClipProcessor`: one clip per question, of any length, frames and sound interleaved.

    ``from_pretrained`` needs the model's configuration and tokenizer only.

    Args:
        feature_extractor: Whisper's.
        image_processor: SigLIP's, working on PIL images as the official code does.
        tokenizer: Qwen2's.
        fps: frames per second, rounded to whole steps in frames of the file.
        max_seconds: frames of so many seconds at most, spread over a longer clip; of sound alone so much is heard.
        num_frame_tokens, num_sound_tokens, add_time_token, video_token_id, audio_token_id, blank_token_id: as in
            `VideoSalmonn2Config`.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        fps: float = 1.0,
        max_seconds: float = 110.0,
        num_frame_tokens: int = 182,
        num_sound_tokens: int = 60,
        add_time_token: bool = True,
        video_token_id: int = 152062,
        audio_token_id: int = 152063,
        blank_token_id: int = 152061,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_extractor, image_processor, tokenizer, **kwargs)
        self.fps, self.max_seconds = fps, max_seconds
        self.num_frame_tokens, self.num_sound_tokens = num_frame_tokens, num_sound_tokens
        self.add_time_token = add_time_token
        self.video_token_id, self.audio_token_id = video_token_id, audio_token_id
        self.blank_token_id = blank_token_id

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> VideoSalmonn2Processor:
        """From the configuration and the tokenizer in a model's folder or repository.

        ``fps`` and ``max_seconds`` are those given, else those of a saved processor.
        """
        chosen = {name: kwargs.pop(name) for name in ("fps", "max_seconds") if name in kwargs}
        saved = cls.get_processor_dict(source, **kwargs)[0]
        chosen = {name: saved[name] for name in ("fps", "max_seconds") if name in saved} | chosen
        config = AutoConfig.from_pretrained(source, **kwargs)
        return cls.from_config(config, AutoTokenizer.from_pretrained(source, **kwargs), **chosen)

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any, **chosen: float) -> VideoSalmonn2Processor:
        """The processor that belongs to a model's configuration; ``chosen``: ``fps``, ``max_seconds``."""
        size, whisper = config.vision_config.image_size, config.audio_config
        names = ("num_frame_tokens", "num_sound_tokens", "add_time_token")
        ids = ("video_token_id", "audio_token_id", "blank_token_id")
        return cls(
            # Two log-mel frames of 10 ms are one of Whisper's states.
            WhisperFeatureExtractor(whisper.num_mel_bins, chunk_length=whisper.max_source_positions // 50),
            SiglipImageProcessorPil(size={"height": size, "width": size}),
            tokenizer,
            **{name: getattr(config, name) for name in (*names, *ids)},
            **chosen,
        )

    @property
    def clip_arguments(self) -> dict[str, Any]:
        """How `load_clip` reads a clip: the official choice of frames, at Whisper's sampling rate."""
        return {"pick": self.pick, "sampling_rate": self.feature_extractor.sampling_rate, "max_pixels": LARGEST_READ}

    def pick(self, total: int, rate: float) -> list[int]:
        """Numbers of the frames that are seen of ``total`` frames, ``rate`` per second."""
        numbers = list(range(0, total, max(round(rate / self.fps), 1)))
        most = round(self.max_seconds * self.fps)
        return numbers if len(numbers) <= most else np.linspace(0, total - 1, most, dtype=int).tolist()

    def render(self, clips: Sequence[Clip], question: str, system_prompt: str | None = None) -> str:
        """The prompt; `<image>` stands for a clip."""
        if len(clips) > 1:
            raise ValueError(f"video-SALMONN 2 answers questions about one clip, got {len(clips)}")
        if IMAGE in question:
            raise ValueError(f"the question contains {IMAGE}, which stands for the clip: {question!r}")
        asked = f"{IMAGE}\n\n{question}" if clips else question
        return (
            f"<|im_start|>system\n{system_prompt or SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def prepare_clips(
        self,
        conversations: Sequence[tuple[Sequence[Clip], str]],
        *,
        use_audio_in_video: bool = False,
        system_prompt: str | None = None,
        frame_pixels: tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The arguments of `VideoSalmonn2ForConditionalGeneration.forward`, padded on the left.

        Picture and sound of a clip are always interleaved, with ``use_audio_in_video`` and without.

        Raises:
            ValueError: several clips in one conversation, a clip of another sampling rate, ``frame_pixels``.
        """
        if frame_pixels is not None:
            raise ValueError("video-SALMONN 2 sees frames of one size only: it takes no number of pixels per frame")
        rows, pictures, sounds, orders = [], [], [], []
        for clips, question in conversations:
            before, mark, after = self.render(clips, question, system_prompt).partition(IMAGE)
            ids = self._ids(before)
            picture = sound = order = None
            if mark:
                picture, sound = self._frames(clips[0]), self._sound(clips[0])
                of_clip, order = self._places(clips[0], sound)
                # The first line break is a token of its own, whatever follows it.
                ids += [*of_clip, *self._ids(after[:1]), *self._ids(after[1:])]
            rows.append(ids)
            pictures.append(picture)
            sounds.append(sound)
            orders.append(order)
        features = {
            "pixel_values_videos": stacked(pictures),
            "input_features": stacked(sounds),
            "sound_order": stacked(orders),
        }
        return padded_prompts(self.tokenizer, rows) | {n: f for n, f in features.items() if f is not None}

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values_videos", "input_features", "sound_order"]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _frames(self, clip: Clip) -> torch.Tensor | None:
        """float32 [frames, 3, height, width], normalised."""
        if clip.frames is None:
            return None
        return self.image_processor(images=list(clip.frames), return_tensors="pt")["pixel_values"]

    def _sound(self, clip: Clip) -> torch.Tensor | None:
        """float32 [windows, mel bins, frames]: what is heard of the sound, no longer than the picture."""
        if clip.audio is None:
            return None
        check_sampling_rate(clip, self.feature_extractor.sampling_rate)
        seconds = self.max_seconds if clip.frames is None else _seconds(clip)
        samples = max(round(clip.sampling_rate * seconds), 1)
        if clip.frames is None and len(clip.audio) > samples:
            heard = len(clip.audio) / clip.sampling_rate
            warnings.warn(f"the model hears only the first {seconds:g} s of {heard:.1f} s of sound", stacklevel=5)
        return log_mel_windows(self.feature_extractor, clip.audio[:samples])

    def _places(self, clip: Clip, sound: torch.Tensor | None) -> tuple[list[int], torch.Tensor | None]:
        """The placeholders of a clip, and which token of the sound stands at each of its own."""
        frame = [self.video_token_id] * self.num_frame_tokens
        if sound is None:
            frames = len(clip.frames)
            times = self._times(_seconds(clip), frames) if self.add_time_token else [[]] * frames
            return [token for time in times for token in [*frame, *time]], None
        tokens = len(sound) * self.num_sound_tokens
        if clip.frames is None:
            return [self.audio_token_id] * tokens, torch.arange(tokens)
        frames = len(clip.frames)
        share, order = shares_of_sound(tokens, frames, _seconds(clip))
        rest = len(order) - share * frames
        return [*frame, *[self.audio_token_id] * share] * frames + [self.audio_token_id] * rest, order

    def _times(self, seconds: float, frames: int) -> list[list[int]]:
        """Tokens of the time at which each frame ends, filled up to one length with blanks."""
        times = [self._ids(str(round(seconds / frames * index, 1))) for index in range(1, frames + 1)]
        longest = max(map(len, times))
        return [[*time, *[self.blank_token_id] * (longest - len(time))] for time in times]


def shares_of_sound(tokens: int, frames: int, seconds: float) -> tuple[int, torch.Tensor]:
    """How a sound's tokens are divided among frames.

    The official code counts 50 tokens to a second and gives those of the picture's seconds to the frames in equal
    shares; tokens are repeated where they cannot be divided. What is left follows behind the last frame. With the
    released settings a second has 2 tokens, and the last window of 30 s is silent behind the sound. So only of a clip
    of about a second anything is left, and in a clip that ends within a window the sound runs ahead of the frames.

    Args:
        tokens: of all windows of the sound, at least 1.
        frames: at least 1.
        seconds: of picture.

    Returns:
        The placeholders of sound behind each frame, and int64 [placeholders]: the number of the token at each.
    """
    front = min(tokens, max(round(seconds * TOKENS_PER_SECOND), 1))
    share = -(-front // frames)
    # In floating point, with its rounding, as the official code repeats the tokens themselves.
    numbers = F.interpolate(torch.arange(front, dtype=torch.float32)[None, None], size=share * frames)[0, 0]
    return share, torch.cat([numbers.long(), torch.arange(front, tokens)])


def _seconds(clip: Clip) -> float:
    """How long the picture lasts."""
    return len(clip.frames) / clip.fps
