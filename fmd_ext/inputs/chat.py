"""From clips and a question to the inputs of a model, by the model's own processor and chat template."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from fmd_ext.inputs.media import Clip, load_clip

SYSTEM_PROMPT = "You are a helpful assistant."
SMALLEST_FRAME = 128 * 28 * 28  # pixels: the least that Qwen2.5-Omni's processor scales a frame to


@runtime_checkable
class ClipProcessor(Protocol):
    """What a processor of our own (`fmd_ext.models`) offers, so that every function of this module serves its model.

    Attributes:
        tokenizer: of the text.
        clip_arguments: arguments of `load_clip` that read a clip as the model wants it, such as ``num_frames``.
    """

    tokenizer: Any
    clip_arguments: dict[str, Any]

    def render(self, clips: Sequence[Clip], question: str, system_prompt: str | None) -> str:
        """The prompt up to the answer, by the model's template, one placeholder per clip (or per part of it)."""

    def prepare_clips(
        self,
        conversations: Sequence[tuple[Sequence[Clip], str]],
        *,
        use_audio_in_video: bool,
        system_prompt: str | None,
        frame_pixels: tuple[int, int] | None,
    ) -> dict[str, Any]:
        """The inputs of `prepare_batch`. An option that the model does not know is a ValueError, never left out."""


def load_clip_for(processor: Any, path: str | Path, **arguments: Any) -> Clip:
    """`load_clip` as the processor's model wants it; what the model leaves open comes from ``arguments``."""
    return load_clip(path, **{**arguments, **getattr(processor, "clip_arguments", {})})


def prepare_inputs(
    processor: Any,
    clips: Clip | Sequence[Clip],
    question: str,
    *,
    use_audio_in_video: bool = False,
    system_prompt: str | None = None,
    frame_pixels: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The inputs of one conversation about one or several clips; ``model.generate(**inputs)`` answers it.

    Args:
        processor: of a Qwen2.5-Omni or Qwen3-Omni model, or a `ClipProcessor`.
        clips: what the question is about; none of them is a question without a clip.
        question: of the user, not empty.
        use_audio_in_video: interleave picture and sound of each clip in time, as the model's own name says, instead
            of all picture first and all sound after it. A clip that lacks one of them has nothing to interleave.
        system_prompt: first turn of the conversation; None: the one that the model was trained with.
        frame_pixels: least and most pixels to which a frame is scaled; None leaves it to the processor. The number
            of visual tokens follows from it: one for 28 x 28 pixels of every two frames (Qwen3-Omni: 32 x 32).

    Returns:
        The inputs by name, with input_ids and attention_mask int64 [1, N]. For Qwen2.5-Omni and Qwen3-Omni: for clips
        with picture pixel_values_videos float32 [patches, 1176 or 1536], video_grid_thw int64 [clips, 3] and
        video_second_per_grid float32 [clips]; for clips with sound input_features float32 [clips, mel, frames] and
        feature_attention_mask [clips, frames]; and use_audio_in_video, true, where picture and sound are interleaved.

    Raises:
        ValueError: an empty question; clips of different frame rates; clips with and without sound together when
            they should be interleaved; a clip whose sampling rate is not the processor's.
    """
    clips = [clips] if isinstance(clips, Clip) else list(clips)
    return prepare_batch(
        processor,
        [(clips, question)],
        use_audio_in_video=use_audio_in_video,
        system_prompt=system_prompt,
        frame_pixels=frame_pixels,
    )


def prepare_batch(
    processor: Any,
    conversations: Sequence[tuple[Sequence[Clip], str]],
    *,
    use_audio_in_video: bool = False,
    system_prompt: str | None = None,
    frame_pixels: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Like prepare_inputs for several conversations (clips, question), padded on the tokenizer's side."""
    for _, question in conversations:
        _check_question(question)
    if isinstance(processor, ClipProcessor):
        return processor.prepare_clips(
            conversations,
            use_audio_in_video=use_audio_in_video,
            system_prompt=system_prompt,
            frame_pixels=frame_pixels,
        )
    texts, clips = [], []
    for own_clips, question in conversations:
        texts.append(_render(processor, own_clips, question, use_audio_in_video, system_prompt))
        clips.extend(own_clips)
    interleaved = use_audio_in_video and any(clip.missing is None for clip in clips)
    if interleaved and any(clip.missing for clip in clips):
        raise ValueError(
            "interleaving needs picture and sound in every clip, and some clips here lack one of them; "
            "use separate audio (use_audio_in_video=False)"
        )

    media: dict[str, Any] = {}
    filmed = [clip for clip in clips if clip.frames is not None]
    if filmed:
        rates = {clip.fps for clip in filmed}
        if len(rates) > 1:
            raise ValueError(f"clips of one call must have one frame rate, got {sorted(rates)} frames per second")
        # [T, H, W, 3] -> [T, 3, H, W]: no guess about where the channels are.
        media["videos"] = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in filmed]
        media["videos_kwargs"] = _video_arguments(processor, rates.pop(), frame_pixels)
    heard = [clip for clip in clips if clip.audio is not None]
    if heard:
        media["audio"] = [_sound_of(clip, processor.feature_extractor) for clip in heard]
    if interleaved:
        media.update(_interleaving_arguments(processor, len(filmed)))

    inputs = dict(processor(text=texts, return_tensors="pt", padding=True, **media))
    if heard:
        frames = inputs["feature_attention_mask"].sum(-1).tolist()
        for clip, count in zip(heard, frames, strict=True):
            # Measured, not foretold: one model's processor cuts the sound at its extractor's window, another does not.
            _warn_of_unheard(clip, count * processor.feature_extractor.hop_length, stacklevel=3)
    if interleaved:
        inputs["use_audio_in_video"] = True
    return inputs


def to_device(inputs: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A copy of the inputs with every tensor on ``device``."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def speech_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs for ``generate`` of the full model with speech out, which takes pixels for its thinker only.

    Without the prefix transformers hands the pixels to the talker too, which refuses arguments that it does not know.
    """
    pixels = ("pixel_values", "pixel_values_videos")
    return {f"thinker_{name}" if name in pixels else name: value for name, value in inputs.items()}


def last_question_token(processor: Any, question: str) -> int:
    """Index, from the end of the prompt (negative), of the last token of the question in ``prepare_inputs``' result.

    What follows the question in the prompt is the chat template's: the end of the turn and the opening of the answer.
    """
    tail = render_question(processor, question).rpartition(question)[2]
    return -1 - len(processor.tokenizer(tail, add_special_tokens=False)["input_ids"])


def render_question(processor: Any, question: str) -> str:
    """The prompt of a question without a clip, up to the answer, by the model's template.

    Raises ValueError for an empty question.
    """
    _check_question(question)
    if isinstance(processor, ClipProcessor):
        return processor.render([], question, None)
    if not hasattr(processor, "tokenizer"):  # a tokenizer, whose template may know neither parts nor a system prompt
        turn = [{"role": "user", "content": question}]
        return processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return _render(processor, [], question, False, None)


def _check_question(question: str) -> None:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is empty: {question!r}")


def _render(processor: Any, clips: Sequence[Clip], question: str, interleave: bool, system_prompt: str | None) -> str:
    parts: list[dict[str, str]] = []
    for clip in clips:
        if clip.frames is not None:
            parts.append({"type": "video"})
        # Interleaved sound has no place of its own: the processor puts it between the frames.
        if clip.audio is not None and not (interleave and clip.frames is not None):
            parts.append({"type": "audio"})
    parts.append({"type": "text", "text": question})
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": system_prompt or SYSTEM_PROMPT}]},
        {"role": "user", "content": parts},
    ]
    return processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def _video_arguments(processor: Any, fps: float, frame_pixels: tuple[int, int] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"fps": fps, "do_sample_frames": False}  # the clip's frames are the sample
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):
        arguments["cap_pixels_per_frame"] = True  # as Qwen's own code does; older versions have no such cap
    own = processor.video_processor.size
    if frame_pixels is None and (own["longest_edge"] or SMALLEST_FRAME) < SMALLEST_FRAME:
        # Qwen2.5-Omni's processor class has a size of its own, past that of its video processor. It must not
        # overrule a processor that was made for small frames.
        frame_pixels = own["shortest_edge"], own["longest_edge"]
    if frame_pixels is not None:
        least, most = frame_pixels
        if not 0 < least <= most:
            raise ValueError(f"frame_pixels must be (least, most) with 0 < least <= most, got {frame_pixels}")
        arguments["size"] = {"shortest_edge": least, "longest_edge": most}
    return arguments


def _sound_of(clip: Clip, extractor: Any) -> np.ndarray:
    """The clip's sound, float32 [samples], of at least one window of the spectrum: models make no token of less.

    Raises ValueError for a sampling rate other than the extractor's.
    """
    check_sampling_rate(clip, extractor.sampling_rate)
    return np.pad(clip.audio, (0, max(0, extractor.n_fft - clip.audio.size)))


def check_sound(extractor: Any, clip: Clip, stacklevel: int) -> None:
    """Raises ValueError for a sampling rate other than the extractor's; warns of sound beyond its window.

    Args:
        extractor: Whisper's feature extractor, with ``sampling_rate`` and ``n_samples``, where it cuts the sound.
        stacklevel: of the warning, counted from the caller.
    """
    check_sampling_rate(clip, extractor.sampling_rate)
    _warn_of_unheard(clip, extractor.n_samples, stacklevel + 1)


def _warn_of_unheard(clip: Clip, samples: int, stacklevel: int) -> None:
    """Warns where the model hears ``samples`` only, and a frame of the spectrum (10 ms) or more is left."""
    if clip.audio.size - samples >= clip.sampling_rate // 100:
        heard, whole = samples / clip.sampling_rate, clip.audio.size / clip.sampling_rate
        warnings.warn(
            f"the model hears only the first {heard:g} s of {whole:.1f} s of sound", stacklevel=stacklevel + 1
        )


def check_sampling_rate(clip: Clip, expected: int) -> None:
    """Raises ValueError for a clip whose sound has another number of samples per second than the model's."""
    if clip.sampling_rate != expected:
        raise ValueError(
            f"the model hears {expected} samples per second, the clip has {clip.sampling_rate}: "
            f"load it with sampling_rate={expected}"
        )


def _interleaving_arguments(processor: Any, num_clips: int) -> dict[str, Any]:
    """How this version of transformers wants to be told that sound belongs to the pictures."""
    if hasattr(processor, "_resolve_audio_from_video"):  # since 5.2x: told which sound belongs to which video
        return {"load_audio_from_video": True, "audio_from_video_indices": list(range(num_clips))}
    return {"use_audio_in_video": True}
