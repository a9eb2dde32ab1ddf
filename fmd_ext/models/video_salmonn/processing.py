"""From clips and questions to the inputs of video-SALMONN, as its official code prepares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ProcessorMixin

from fmd_ext.inputs.chat import check_sound
from fmd_ext.inputs.media import Clip
from fmd_ext.models.batching import padded_prompts, stacked
from fmd_ext.models.beats import fbank

SECONDS_OF_PICTURE = 60
SHORTEST_SOUND_S = 3
# CLIP's normalisation of colours in [0, 1].
COLOUR_MEAN = (0.48145466, 0.4578275, 0.40821073)
COLOUR_STD = (0.26862954, 0.26130258, 0.27577711)


class VideoSalmonnProcessor(ProcessorMixin):
    """A `fmd_ext.inputs.chat.ClipProcessor`: one clip per question, two frames per second, 30 seconds of sound.

    Args:
        feature_extractor: Whisper's.
        tokenizer: Llama's.
        qformer_tokenizer: BERT's: the question steers how frames are read.
        image_size: pixels of a frame's sides.
        frames_per_group, num_joint_queries, speech_tokens_per_frame, video_token_id, audio_token_id, joint_token_id:
            as in `VideoSalmonnConfig`.
    """

    # The first and the last frame of each second, as the model saw them in training.
    clip_arguments = {"edge_seconds": SECONDS_OF_PICTURE, "sampling_rate": 16000}

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        qformer_tokenizer: Any = None,
        image_size: int = 224,
        frames_per_group: int = 10,
        num_joint_queries: int = 30,
        speech_tokens_per_frame: int = 25,
        video_token_id: int = 3,
        audio_token_id: int = 4,
        joint_token_id: int = 5,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.frames_per_group = frames_per_group
        self.num_joint_queries = num_joint_queries
        self.speech_tokens_per_frame = speech_tokens_per_frame
        self.video_token_id = video_token_id
        self.audio_token_id = audio_token_id
        self.joint_token_id = joint_token_id
        if qformer_tokenizer is not None:
            qformer_tokenizer.truncation_side = "left"  # of a long question its end steers how frames are read
        super().__init__(feature_extractor, tokenizer, qformer_tokenizer, **kwargs)

    @classmethod
    def of_config(cls, config: Any, feature_extractor: Any, tokenizer: Any, qformer_tokenizer: Any):
        """The processor that goes with a `VideoSalmonnConfig`."""
        shared = ("frames_per_group", "num_joint_queries", "speech_tokens_per_frame")
        ids = ("video_token_id", "audio_token_id", "joint_token_id")
        settings = {name: getattr(config, name) for name in (*shared, *ids)}
        return cls(
            feature_extractor, tokenizer, qformer_tokenizer, image_size=config.vision_config.image_size, **settings
        )

    def render(self, clips: Sequence[Clip], question: str, system_prompt: str | None) -> str:
        """The prompt; ``<video>``, ``<audio>`` or ``<video+audio>`` stands for the tokens of the clip."""
        before, after = self._prompt(clips, question, system_prompt)
        marks = {None: "<video+audio>", "audio": "<video>", "video": "<audio>"}
        return before + "".join(marks[clip.missing] for clip in clips) + after

    def prepare_clips(
        self,
        conversations: Sequence[tuple[Sequence[Clip], str]],
        *,
        use_audio_in_video: bool = False,
        system_prompt: str | None = None,
        frame_pixels: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """The arguments of `VideoSalmonnForConditionalGeneration.forward`, padded on the left.

        Raises:
            ValueError: several clips in one conversation, a clip of another sampling rate, or an option that the
                model does not know (``use_audio_in_video``, a system prompt, ``frame_pixels``).
        """
        if use_audio_in_video:
            raise ValueError("video-SALMONN joins picture and sound in every token; there is nothing to interleave")
        if frame_pixels is not None:
            raise ValueError(f"video-SALMONN scales every frame to {self.image_size} pixels square")
        samples, rows = [], []
        for clips, question in conversations:
            before, after = self._prompt(clips, question, system_prompt)
            features = self._features(clips[0]) if clips else {}
            ids = [self.tokenizer.bos_token_id, *self._ids(before), *self._placeholders(features), *self._ids(after)]
            samples.append(features)
            rows.append(ids)
        inputs = padded_prompts(self.tokenizer, rows)
        questions = self.qformer_tokenizer(
            [question for _, question in conversations],
            padding="longest",
            truncation=True,
            max_length=512,
            return_tensors="pt",
        )
        if any("pixel_values" in sample for sample in samples):
            inputs["qformer_input_ids"] = questions["input_ids"]
            inputs["qformer_attention_mask"] = questions["attention_mask"]
        for name, count in (("pixel_values", "num_frames"), ("beats_features", "num_beats_frames")):
            inputs.update(_stacked(samples, name, count))
        inputs.update(_stacked(samples, "input_features"))
        return inputs

    def _prompt(self, clips: Sequence[Clip], question: str, system_prompt: str | None) -> tuple[str, str]:
        if system_prompt is not None:
            raise ValueError("video-SALMONN was trained without a system prompt")
        if len(clips) > 1:
            raise ValueError(f"video-SALMONN answers questions about one clip, got {len(clips)}")
        return "USER: <Img>", f"</Img> {question}\nASSISTANT:"

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _features(self, clip: Clip) -> dict[str, torch.Tensor]:
        features = {}
        if clip.frames is not None:
            features["pixel_values"] = self.frame_pixels(clip.frames)
        if clip.audio is not None:
            audio = self._window(clip)
            rate = self.feature_extractor.sampling_rate
            log_mel = self.feature_extractor(audio, sampling_rate=rate, return_tensors="pt")["input_features"]
            features["input_features"] = log_mel[0]
            features["beats_features"] = fbank(audio)
        return features

    def frame_pixels(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [frames, H, W, 3] -> float32 [frames, 3, size, size]; stretched to a square, no antialiasing."""
        colours = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255.0
        side = self.image_size
        colours = F.interpolate(colours, size=(side, side), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values)[:, None, None] for values in (COLOUR_MEAN, COLOUR_STD))
        return (colours - mean) / std

    def _window(self, clip: Clip) -> np.ndarray:
        """The sound that the model hears: at least three seconds, at most Whisper's window."""
        extractor = self.feature_extractor
        check_sound(extractor, clip, stacklevel=5)
        audio = clip.audio[: extractor.n_samples]
        shortest = min(SHORTEST_SOUND_S * extractor.sampling_rate, extractor.n_samples)
        return np.pad(audio, (0, max(0, shortest - audio.size)))

    def _placeholders(self, features: dict[str, torch.Tensor]) -> list[int]:
        frames = len(features.get("pixel_values", ()))
        hears = "input_features" in features
        if not frames and not hears:
            return []
        token = self.joint_token_id if frames and hears else self.video_token_id if frames else self.audio_token_id
        # Whisper gives one token per two log-mel frames.
        audio_frames = self.feature_extractor.nb_max_frames // 2 // self.speech_tokens_per_frame if hears else 0
        groups = -(-max(frames, audio_frames) // self.frames_per_group)
        return [token] * (groups * self.num_joint_queries)


def _stacked(samples: list[dict[str, torch.Tensor]], name: str, count: str | None = None) -> dict[str, torch.Tensor]:
    """``name`` of the samples that have it [batch, longest, ...]; under ``count`` how long each is."""
    own = [sample.get(name) for sample in samples]
    whole = stacked(own)
    if whole is None:
        return {}
    lengths = torch.tensor([0 if one is None else len(one) for one in own])
    return {name: whole} if count is None else {name: whole, count: lengths}
