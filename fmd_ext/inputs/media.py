"""Reads a clip into sampled frames and a mono waveform. PyAV (FFmpeg) does the decoding.

Why not a library's reader: transformers' ``load_video`` (5.23) counts frames by the container's header (which has no
number in Matroska), times them by the mean rate and leaves pictures on their side; its ``load_audio`` reads no sound
out of video files. Both can use torchcodec, whose published wheel (0.17) loads beside a CUDA build of torch only and
needs FFmpeg's libraries on the system; PyAV's wheel brings its own.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import av.stream
import numpy as np
from tqdm import tqdm

from fmd_ext.inputs.frames import FrameChoice, FrameReader, Timeline, check_above_zero
from fmd_ext.inputs.sound import SoundReader

logger = logging.getLogger(__name__)

# FFmpeg reads any file named .txt as a drawing in ANSI characters and makes a video of it.
_FORMATS_THAT_ARE_NO_MEDIA = ("tty",)
# Titles and the like need not be UTF-8, and nobody reads them here. PyAV before 19 must be told not to fail.
_ANY_METADATA = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


class MediaError(ValueError):
    """A file that cannot be used as a clip; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a model gets of a clip.

    Args:
        frames: uint8 [T, H, W, 3] RGB, one every ``1 / fps`` seconds from the start; None: no picture.
        fps: frames per second of ``frames``, lower than what was asked for when ``max_frames`` set the limit.
        audio: float32 [samples], mono, in [-1, 1], aligned with the start of the picture; None: no sound.
        sampling_rate: samples per second of ``audio``.
        duration_s: seconds of picture or sound, whichever is longer.
        path: the file, None for a clip from elsewhere.
    """

    frames: np.ndarray | None
    fps: float
    audio: np.ndarray | None
    sampling_rate: int
    duration_s: float
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.frames is None and self.audio is None:
            raise ValueError("a clip needs frames or audio, got neither")
        if self.frames is not None and (
            self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3 or not self.frames.size
        ):
            raise ValueError(f"frames must be uint8 [T, H, W, 3], got {self.frames.dtype} {list(self.frames.shape)}")
        if self.audio is not None and (self.audio.dtype != np.float32 or self.audio.ndim != 1 or not self.audio.size):
            raise ValueError(f"audio must be float32 [samples], got {self.audio.dtype} {list(self.audio.shape)}")
        if not self.fps > 0 or not self.sampling_rate > 0:
            raise ValueError(f"fps and sampling_rate must be above 0, got {self.fps} and {self.sampling_rate}")

    @property
    def missing(self) -> str | None:
        """``"audio"`` or ``"video"``: the part that the clip lacks. Without both there is nothing to fork."""
        return "audio" if self.audio is None else "video" if self.frames is None else None


def load_clip(
    path: str | Path,
    *,
    fps: float = 2.0,
    max_frames: int = 768,
    num_frames: int | None = None,
    edge_seconds: int | None = None,
    pick: Callable[[int, float], Sequence[int]] | None = None,
    audio_track: int | None = None,
    sampling_rate: int = 16000,
    max_pixels: int = 1_000_000,
    progress: bool = True,
) -> Clip:
    """Decodes a clip and keeps one frame every ``1 / fps`` seconds: the one that a player would show at that time.

    With ``num_frames`` it keeps the frames in the middle of so many equal parts of the picture, counted in frames; with
    ``edge_seconds`` the first and the last frame of every second; with ``pick`` those that a model picks by a rule of
    its own.
    Only the sampled frames are kept, so memory does not grow with the frame rate of the file.

    Args:
        path: a video or audio file of any format that FFmpeg reads.
        fps: frames to keep per second, above 0.
        max_frames: at most so many frames; a longer clip is sampled evenly at a lower rate.
        num_frames: exactly so many frames instead, whatever the clip's length; ``fps`` and ``max_frames`` have no
            effect then. A picture of fewer frames repeats them.
        edge_seconds: two frames of each of at most so many first seconds, as video-SALMONN takes them: the first and
            the last one in it. What is left behind the last full second is part of one that ends with the picture.
            ``fps`` and ``max_frames`` have no effect then; the clip's ``fps`` is 2.
        pick: gets how many frames the picture has and how many it shows per second, returns the numbers (from 0,
            ascending) of those to keep. ``fps`` and ``max_frames`` have no effect then.
        audio_track: number of the sound track that is heard, from 0; None: the first.
        sampling_rate: rate to which the sound is resampled (mono: the mean of the channels), samples per second.
        max_pixels: frames with more pixels are scaled down to about so many (width and height alike).
        progress: show a progress bar on stderr once reading takes over a second.

    Returns:
        A clip whose ``frames`` or ``audio`` is None where the file has no such stream, or nothing in it can be decoded.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        MediaError: the file is no media, has neither picture nor sound, or neither can be decoded; there is no such
            ``audio_track``.
        ValueError: an argument out of range.
    """
    choice = FrameChoice(fps, max_frames, num_frames, edge_seconds, pick)
    check_above_zero(sampling_rate=sampling_rate, max_pixels=max_pixels)
    with _opened(path) as container:
        video, audio = _streams(container, path, audio_track)
        if audio_track is None and len(container.streams.audio) > 1:
            count = len(container.streams.audio)
            logger.warning("%s has %d sound tracks, the first is heard: audio_track chooses another", path, count)
        return _read(container, Path(path), video, audio, choice, int(sampling_rate), int(max_pixels), progress)


def check_clip(path: str | Path, audio_track: int | None = None) -> None:
    """Raises what `load_clip` raises for a file that is missing or no media, or lacks that track, without decoding."""
    with _opened(path) as container:
        _streams(container, path, audio_track)


def clip_seconds(path: str | Path | None) -> float:
    """How long the file says it lasts, without decoding it; 0 for one that cannot be read or is not there."""
    try:
        with _opened(path or "") as container:
            return _duration(container, [*container.streams.video[:1], *container.streams.audio[:1]])
    except (MediaError, OSError):
        return 0.0


def _opened(path: str | Path) -> av.container.InputContainer:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a clip")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        container = av.open(str(path), **_ANY_METADATA)
    except av.FFmpegError as error:
        raise MediaError(f"{path} is no media file that can be read: {error.strerror}") from error
    if container.format.name in _FORMATS_THAT_ARE_NO_MEDIA:
        container.close()
        raise MediaError(f"{path} is a text file, not a clip")
    return container


def _streams(
    container: av.container.InputContainer, path: str | Path, audio_track: int | None
) -> tuple[av.VideoStream | None, av.AudioStream | None]:
    """The picture and the chosen sound."""
    video = next((stream for stream in container.streams.video if not _is_cover_picture(stream)), None)
    tracks = container.streams.audio
    if audio_track is not None and not 0 <= audio_track < len(tracks):
        raise MediaError(f"{path} has {len(tracks)} sound tracks, counted from 0; there is no track {audio_track}")
    if video is None and not tracks:
        raise MediaError(f"{path} has neither a video nor an audio stream")
    return video, tracks[audio_track or 0] if tracks else None


def _read(
    container: av.container.InputContainer,
    path: Path,
    video: av.VideoStream | None,
    audio: av.AudioStream | None,
    choice: FrameChoice,
    sampling_rate: int,
    max_pixels: int,
    progress: bool,
) -> Clip:
    timeline = None
    if _has_decoder(video):
        timeline = Timeline.of_packets(_packets(container, [video]), video)
    fps, frames, sound = choice.fps, None, SoundReader(sampling_rate)
    if timeline is not None:
        numbers, fps = choice.numbers_of(timeline)
        frames = FrameReader(timeline, numbers, max_pixels)
    _decode(container, path, {video: frames, audio: sound if _has_decoder(audio) else None}, progress)

    picture = None if frames is None else frames.finish()
    waveform = sound.finish(timeline.origin if picture is not None else None)
    if sound.channels > 2:
        logger.warning("%s: the mean of its %d channels of sound is heard", path, sound.channels)
    empty = [s for s, content in ((video, picture), (audio, waveform)) if s is not None and content is None]
    if picture is None and waveform is None:
        raise MediaError(f"{path}: nothing in its {_named(empty)} can be decoded")
    if empty:
        logger.warning("%s: nothing in its %s can be decoded, the rest is taken", path, _named(empty))
    seconds = max(
        0.0 if picture is None else float(timeline.duration), 0.0 if waveform is None else len(waveform) / sampling_rate
    )
    said = _duration(container, [stream for stream in (video, audio) if stream is not None])
    if seconds < 0.9 * said:
        logger.warning("%s says it lasts %.1f s, but only %.1f s can be read", path, said, seconds)
    return Clip(picture, float(fps), waveform, sampling_rate, seconds, path)


def _decode(
    container: av.container.InputContainer,
    path: Path,
    readers: dict[av.stream.Stream | None, FrameReader | SoundReader | None],
    progress: bool,
) -> None:
    """Hands all that can be decoded of each stream to its reader."""
    streams = [stream for stream, reader in readers.items() if stream is not None and reader is not None]
    for stream in streams:
        if stream.type == "video":
            stream.thread_type = "AUTO"
    broken = 0
    with tqdm(
        total=max(_duration(container, streams), 0.1),
        desc=f"reading {path.name}",
        bar_format="{desc}: {percentage:.0f} % |{bar}| {n:.0f} of {total:.0f} s",
        delay=1.0,
        leave=False,
        disable=None if progress else True,  # None: only on a terminal
    ) as bar:
        for packet in container.demux(streams) if streams else ():
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:
                broken += 1
                logger.debug("%s: a packet cannot be decoded: %s", path, error)
                continue
            for frame in decoded:
                readers[packet.stream].add(frame)
                if frame.time is not None and frame.time > bar.n:
                    bar.update(min(frame.time, bar.total) - bar.n)
    if broken:
        logger.warning("%s is damaged: %d packets could not be decoded and were left out", path, broken)


def _named(streams: Sequence[av.stream.Stream]) -> str:
    names = [
        stream.codec.name if _has_decoder(stream) else "of a codec that FFmpeg does not know" for stream in streams
    ]
    return " and ".join(f"{stream.type} stream ({name})" for stream, name in zip(streams, names, strict=True))


def _has_decoder(stream: av.stream.Stream | None) -> bool:
    return stream is not None and stream.codec_context is not None


def _is_cover_picture(stream: av.VideoStream) -> bool:
    """Music files carry their cover as a video stream of one picture."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _duration(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> float:
    """Seconds that the file says it lasts; where it does not say, its packets are counted, without decoding."""
    if container.duration:
        return container.duration / av.time_base
    known = [float(stream.duration * stream.time_base) for stream in streams if stream.duration]
    if known:
        return max(known)
    end = 0.0
    for packet in _packets(container, streams):
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end


def _packets(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> Iterator[av.Packet]:
    """All packets of these streams. From the file opened once more: after a seek back to the start FFmpeg 9 leaves out
    the first samples of a sound."""
    with av.open(container.name, **_ANY_METADATA) as again:
        yield from again.demux([again.streams[stream.index] for stream in streams])
