"""From clips and questions to the inputs of video-SALMONN 2+, as its official code prepares them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, ProcessorMixin, WhisperFeatureExtractor

from fmd_ext.inputs.chat import SYSTEM_PROMPT, check_sampling_rate
from fmd_ext.inputs.media import Clip
from fmd_ext.models.batching import padded_prompts, stacked
from fmd_ext.models.windowed_sound import log_mel_windows

from .configuration import VideoSalmonn2PlusConfig

VIDEO, AUDIO = "<video>", "<audio>"  # placeholders in a prompt

FRAMES_PER_SECOND, FEWEST_FRAMES, MOST_FRAMES = 10, 16, 768
# Pixels of a frame where a clip has the most frames; what a clip of fewer frames leaves of the sum is shared by its
# frames, but for a twentieth.
FRAME_PIXELS = 61250
SMALLEST_FRAME = 4 * 28 * 28
LARGEST_READ = 1920 * 1080  # pixels; frames of larger pictures are scaled down when they are read


class VideoSalmonn2PlusProcessor(ProcessorMixin):
    """Tokenizer, video processor and log-mel windows of video-SALMONN 2+; a `fmd_ext.inputs.chat.ClipProcessor`.

    ``from_pretrained`` needs a model's configuration and tokenizer only.

    Args:
        tokenizer: Qwen2.5-VL's, with one token more, ``<|audio_pad|>``.
        video_processor: Qwen2-VL's, as Qwen2.5-VL takes it.
        feature_extractor: Whisper's; the windows that it makes are heard one behind the other.
        tokens_per_window: that the model makes of a window of sound.
        video_token_id, audio_token_id: the placeholders' ids.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        video_processor: Any = None,
        feature_extractor: Any = None,
        tokens_per_window: int = 60,
        video_token_id: int = 151656,
        audio_token_id: int = 151665,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_window = tokens_per_window
        self.video_token_id, self.audio_token_id = video_token_id, audio_token_id
        super().__init__(tokenizer, video_processor, feature_extractor, **kwargs)

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> VideoSalmonn2PlusProcessor:
        """From the configuration and the tokenizer in a model's folder or repository."""
        config = VideoSalmonn2PlusConfig.from_pretrained(source, **kwargs)
        return cls.from_config(config, AutoTokenizer.from_pretrained(source, **kwargs))

    @classmethod
    def from_config(cls, config: VideoSalmonn2PlusConfig, tokenizer: Any) -> VideoSalmonn2PlusProcessor:
        """The processor that belongs to a model's configuration.

        Raises ValueError for a tokenizer that does not know the tokens of clips, or has them at other ids. Without
        files transformers makes an empty one.
        """
        vocabulary = tokenizer.get_vocab()
        names = {"<|video_pad|>": "video", "<|audio_pad|>": "audio"}
        names |= {"<|vision_start|>": "vision_start", "<|vision_end|>": "vision_end"}
        for token, name in names.items():
            found, expected = vocabulary.get(token), getattr(config, f"{name}_token_id")
            if found != expected:
                known = "does not know the token" if found is None else f"has at {found} the token"
                raise ValueError(f"the tokenizer {known} {token}, which is {expected} to the model")
        from transformers import Qwen2VLVideoProcessor  # only here: it imports torchvision

        vision = config.vision_config
        return cls(
            tokenizer,
            Qwen2VLVideoProcessor(
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
            ),
            WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins),
            tokens_per_window=config.audio_config.num_tokens,
            video_token_id=config.video_token_id,
            audio_token_id=config.audio_token_id,
        )

    @property
    def clip_arguments(self) -> dict[str, Any]:
        """How `load_clip` reads a clip: the official choice of frames, at the feature extractor's sampling rate."""
        return {
            "pick": spread_frames,
            "sampling_rate": self.feature_extractor.sampling_rate,
            "max_pixels": LARGEST_READ,
        }

    @property
    def model_input_names(self) -> list[str]:
        names = ["pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "input_features"]
        return ["input_ids", "attention_mask", *names]

    def render(self, clips: Sequence[Clip], question: str, system_prompt: str | None = None) -> str:
        """The prompt: ``<video>`` stands for a clip with picture (and its sound, if it has), ``<audio>`` for sound."""
        if VIDEO in question or AUDIO in question:
            raise ValueError(f"the question contains {VIDEO} or {AUDIO}, which stand for clips: {question!r}")
        parts = [AUDIO if clip.frames is None else VIDEO for clip in clips]
        turns = {"system": system_prompt or SYSTEM_PROMPT, "user": "\n".join([*parts, question])}
        said = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns.items())
        return said + "<|im_start|>assistant\n"

    def prepare_clips(
        self,
        conversations: Sequence[tuple[Sequence[Clip], str]],
        *,
        use_audio_in_video: bool = False,
        system_prompt: str | None = None,
        frame_pixels: tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `fmd_ext.inputs.chat.prepare_batch`. Picture and sound are interleaved, asked or not."""
        clips = [list(own) for own, _ in conversations]
        texts = [self.render(own, question, system_prompt) for own, question in conversations]
        return self(texts, clips, frame_pixels)

    def __call__(
        self, text: Sequence[str], clips: Sequence[Sequence[Clip]], frame_pixels: tuple[int, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """The inputs of prompts with their clips, padded on the left.

        Args:
            text: prompts, with `<video>` or `<audio>` for each of their clips, in order.
            clips: those of each prompt.
            frame_pixels: least and most pixels of a frame; None: what the official code chooses, see FRAME_PIXELS.

        Returns:
            input_ids and attention_mask int64 [batch, length]; with any picture pixel_values_videos float32 [patches,
            1176], video_grid_thw int64 [clips, 3] and second_per_grid_ts float32 [clips]; with any sound
            input_features float32 [batch, windows, mel bins, 3000], zeros behind the windows of a sample's own.

        Raises:
            ValueError: placeholders that do not match the clips, another sampling rate than the feature extractor's,
                text that is tokenized to a placeholder's id.
        """
        pictures: list[dict[str, Any]] = []
        windows: list[torch.Tensor | None] = []
        rows = []
        for prompt, own in zip(text, clips, strict=True):
            filling, heard = [], []
            for clip in own:
                picture = None if clip.frames is None else self._picture(clip, frame_pixels)
                sound = [] if clip.audio is None else [self._windows(clip)]
                filling.append(self._placeholders(picture, sum(map(len, sound)) * self.tokens_per_window))
                heard += sound
                pictures += [] if picture is None else [picture]
            rows.append(self._ids(prompt, own, filling))
            windows.append(torch.cat(heard) if heard else None)
        inputs = padded_prompts(self.tokenizer, rows)
        if pictures:
            inputs["pixel_values_videos"] = torch.cat([picture["pixels"] for picture in pictures])
            inputs["video_grid_thw"] = torch.stack([picture["grid"] for picture in pictures])
            inputs["second_per_grid_ts"] = torch.tensor([picture["seconds"] for picture in pictures])
        features = stacked(windows)
        if features is not None:
            inputs["input_features"] = features
        return inputs

    def _picture(self, clip: Clip, frame_pixels: tuple[int, int] | None) -> dict[str, Any]:
        """``pixels`` [patches, channels], their ``grid`` [3], and ``seconds`` from a pair of frames to the next."""
        least, most = frame_pixels or (SMALLEST_FRAME, pixel_budget(len(clip.frames)))
        if not 0 < least <= most:
            raise ValueError(f"frame_pixels must be (least, most) with 0 < least <= most, got {frame_pixels}")
        out = self.video_processor(
            torch.from_numpy(clip.frames).permute(0, 3, 1, 2),
            size={"shortest_edge": least, "longest_edge": int(most)},
            cap_pixels_per_frame=False,
            return_tensors="pt",
        )
        seconds = self.video_processor.temporal_patch_size / clip.fps
        return {"pixels": out["pixel_values_videos"], "grid": out["video_grid_thw"][0], "seconds": seconds}

    def _windows(self, clip: Clip) -> torch.Tensor:
        """The log-mel windows [windows, mel bins, 3000] of a sound, 30 s each, the last one filled up with silence."""
        check_sampling_rate(clip, self.feature_extractor.sampling_rate)
        return log_mel_windows(self.feature_extractor, clip.audio)

    def _placeholders(self, picture: dict[str, Any] | None, num_audio: int) -> list[int]:
        """The clip's tokens: each pair of frames followed by the sound up to the next, the last by all that is left."""
        if picture is None:
            return [self.audio_token_id] * num_audio
        time, height, width = picture["grid"].tolist()
        each = height * width // self.video_processor.merge_size**2
        ids: list[int] = []
        for count in sound_after_frames(time, picture["seconds"], num_audio):
            ids += [self.video_token_id] * each + [self.audio_token_id] * count
        return ids

    def _ids(self, text: str, clips: Sequence[Clip], filling: list[list[int]]) -> list[int]:
        pieces = re.split(f"({VIDEO}|{AUDIO})", text)
        expected = [AUDIO if clip.frames is None else VIDEO for clip in clips]
        if pieces[1::2] != expected:
            raise ValueError(f"the prompt has the placeholders {pieces[1::2]}, its clips need {expected}")
        before, after = "<|vision_start|>", "<|vision_end|>"
        ids: list[int] = []
        # Tokenized piece by piece, so that no token reaches across a placeholder.
        for index, piece in enumerate(pieces[::2]):
            opened = before if index < len(clips) else ""
            own = self.tokenizer((after if index else "") + piece + opened, add_special_tokens=False)["input_ids"]
            if {self.video_token_id, self.audio_token_id} & set(own):
                raise ValueError(f"the prompt contains text that stands for a placeholder: {piece!r}")
            ids += own + (filling[index] if opened else [])
        return ids


def spread_frames(total: int, rate: float) -> list[int]:
    """Numbers of the frames that are seen: ten per second, at least 16, at most 768, spread from first to last."""
    wanted = round(total / rate * FRAMES_PER_SECOND)
    wanted = min(max(wanted, FEWEST_FRAMES), MOST_FRAMES)
    return np.unique(np.linspace(0, total - 1, wanted, dtype=int)).tolist()


def pixel_budget(num_frames: int) -> float:
    """Most pixels of a frame of a clip of so many frames."""
    return FRAME_PIXELS if num_frames >= MOST_FRAMES else 0.95 * MOST_FRAMES / num_frames * FRAME_PIXELS


def sound_after_frames(num_grids: int, seconds: float, num_audio: int) -> list[int]:
    """How many of ``num_audio`` tokens of sound, two per second, follow each of ``num_grids`` pairs of frames.

    Args:
        seconds: from a pair of frames to the next.

    Where picture goes on after the sound, which the official code does not allow, its frames are followed by none.
    """
    # In float32, as the official code counts.
    starts = (torch.arange(num_grids) * seconds * 2).long().clamp(max=num_audio)
    return torch.diff(starts, append=starts.new_tensor([num_audio])).tolist()
