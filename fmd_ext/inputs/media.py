"""Reads a clip into sampled frames and a mono waveform. PyAV (FFmpeg) does the decoding."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.stream
import numpy as np
from tqdm import tqdm

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
        sampling_rate: rate to which the sound is resampled (mono: the mean of the channels), samples per second.
        max_pixels: frames with more pixels are scaled down to about so many (width and height alike).
        progress: show a progress bar on stderr once reading takes over a second.

    Returns:
        A clip whose ``frames`` or ``audio`` is None where the file has no such stream.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        MediaError: the file is no media, has neither picture nor sound, or nothing in a stream can be decoded.
        ValueError: an argument out of range.
    """
    _check_above_zero(fps=fps, max_frames=max_frames, sampling_rate=sampling_rate, max_pixels=max_pixels)
    rules = {"num_frames": num_frames, "edge_seconds": edge_seconds, "pick": pick}
    given = [name for name, rule in rules.items() if rule is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if num_frames is not None:
        _check_above_zero(num_frames=num_frames)
        pick = functools.partial(_middles_of, int(num_frames))
    if edge_seconds is not None:
        _check_above_zero(edge_seconds=edge_seconds)
    with _opened(path) as container:
        rule = (pick, edge_seconds)
        return _read(container, Path(path), fps, max_frames, *rule, int(sampling_rate), int(max_pixels), progress)


def check_clip(path: str | Path) -> None:
    """Raises what `load_clip` raises for a file that is missing or no media, without decoding it."""
    _opened(path).close()


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


def _read(
    container: av.container.InputContainer,
    path: Path,
    fps: float,
    max_frames: int,
    pick: Callable[[int, float], Sequence[int]] | None,
    edge_seconds: int | None,
    sampling_rate: int,
    max_pixels: int,
    progress: bool,
) -> Clip:
    video = next((stream for stream in container.streams.video if not _is_cover_picture(stream)), None)
    audio = next(iter(container.streams.audio), None)
    streams = [stream for stream in (video, audio) if stream is not None]
    if not streams:
        raise MediaError(f"{path} has neither a video nor an audio stream")

    duration = _duration(container, streams)
    if video is None:
        frames = None
    elif pick is not None:
        total = _count_packets(container, video)
        frames = _NumberSampler(video, list(pick(total, float(video.average_rate or 25))), max_pixels)
    elif edge_seconds is not None:
        seconds = video.duration * video.time_base if video.duration else Fraction(duration)
        frames = _EdgeSampler(video, _seconds(seconds)[: int(edge_seconds)], max_pixels)
    else:
        if duration * fps > max_frames:
            fps = max_frames / duration
        frames = _FrameSampler(video, fps, int(max_frames), max_pixels)
    samples = _AudioReader(sampling_rate) if audio is not None else None
    if video is not None:
        video.thread_type = "AUTO"

    broken = 0
    with tqdm(
        total=max(duration, 0.1),
        desc=f"reading {path.name}",
        bar_format="{desc}: {percentage:.0f} % |{bar}| {n:.0f} of {total:.0f} s",
        delay=1.0,
        leave=False,
        disable=not progress,
    ) as bar:
        for packet in container.demux(streams):
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:
                broken += 1
                logger.debug("%s: a packet cannot be decoded: %s", path, error)
                continue
            for frame in decoded:
                (frames if packet.stream is video else samples).add(frame)
                if frame.time is not None and frame.time > bar.n:
                    bar.update(min(frame.time, bar.total) - bar.n)

    picture = frames.finish() if frames is not None else None
    waveform = samples.finish(frames.origin if frames is not None else None) if samples is not None else None
    for stream, content in ((video, picture), (audio, waveform)):
        if stream is not None and content is None:
            raise MediaError(f"{path}: nothing in its {stream.type} stream ({stream.codec.name}) can be decoded")
    if broken:
        logger.warning("%s is damaged: %d packets could not be decoded and were left out", path, broken)
    seconds = [frames.end] if frames is not None else []
    seconds += [len(waveform) / sampling_rate] if waveform is not None else []
    if max(seconds) < 0.9 * duration:
        logger.warning("%s says it lasts %.1f s, but only %.1f s can be read", path, duration, max(seconds))
    if picture is not None and pick is not None:
        fps = len(picture) / frames.end
    elif edge_seconds is not None:
        fps = 2.0
    return Clip(picture, float(fps), waveform, sampling_rate, max(seconds), path)


class _FrameSampler:
    """Gets every decoded frame, keeps those on show at times k / fps, counted from the first frame."""

    def __init__(self, stream: av.VideoStream, fps: float, max_frames: int, max_pixels: int) -> None:
        self.fps, self.max_frames, self.max_pixels = fps, max_frames, max_pixels
        self.frame_seconds = float(1 / (stream.average_rate or Fraction(25)))
        self.origin: float | None = None  # time stamp of the first frame, seconds
        self.end = 0.0  # seconds from the origin at which the last frame ends
        self._latest: av.VideoFrame | None = None
        self._kept: list[np.ndarray] = []

    def add(self, frame: av.VideoFrame) -> None:
        time = frame.time if frame.time is not None else (self.origin or 0.0) + self.end
        if self.origin is None:
            self.origin = time
        time -= self.origin
        if time + self.frame_seconds <= self.end:
            return  # out of order: a player would not show it either
        self._keep_until(time)
        self._latest = frame
        self.end = time + self.frame_seconds

    def finish(self) -> np.ndarray | None:
        self._keep_until(self.end)
        return np.stack(self._kept) if self._kept else None

    def _keep_until(self, end: float) -> None:
        """Keeps the latest frame for every sampling time before ``end``."""
        if self._latest is None:
            return
        # Half a microsecond, so that a time stamp rounded to the file's time base is not taken for an earlier one.
        due = min(math.ceil((end - 5e-7) * self.fps), self.max_frames) - len(self._kept)
        if due > 0:
            self._kept += [self._picture(self._latest)] * due

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        scale = min(1.0, math.sqrt(self.max_pixels / (frame.width * frame.height)))
        width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        if self._kept and not frame.rotation % 180 and image.shape != self._kept[0].shape:
            height, width = self._kept[0].shape[:2]  # the size changes within the stream
            image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        # Phones store pictures as the sensor sees them, with the angle by which to turn them (counterclockwise).
        return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


class _NumberSampler(_FrameSampler):
    """Gets every decoded frame, keeps those with the given numbers (ascending, one may come twice)."""

    def __init__(self, stream: av.VideoStream, numbers: list[int], max_pixels: int) -> None:
        super().__init__(stream, fps=0.0, max_frames=len(numbers), max_pixels=max_pixels)
        self._numbers = numbers
        self._next = 0  # number of the frame that comes next

    def add(self, frame: av.VideoFrame) -> None:
        time = frame.time if frame.time is not None else (self.origin or 0.0) + self.end
        self.origin = time if self.origin is None else self.origin
        self.end = max(self.end, time - self.origin + self.frame_seconds)
        self._latest = frame
        due = self._numbers.count(self._next)
        if due:
            self._kept += [self._picture(frame)] * due
        self._next += 1

    def finish(self) -> np.ndarray | None:
        missing = len(self._numbers) - len(self._kept)  # packets that gave no frame
        if missing and self._latest is not None:
            self._kept += [self._picture(self._latest)] * missing
        return np.stack(self._kept) if self._kept else None


class _EdgeSampler(_FrameSampler):
    """Gets every decoded frame, keeps the first and the last in each of the time spans (start, end), start included."""

    def __init__(self, stream: av.VideoStream, spans: list[tuple[Fraction, Fraction]], max_pixels: int) -> None:
        super().__init__(stream, fps=2.0, max_frames=2 * len(spans), max_pixels=max_pixels)
        self._edges: dict[tuple[Fraction, Fraction], list[av.VideoFrame]] = {span: [] for span in spans}
        self._start: Fraction | None = None

    def add(self, frame: av.VideoFrame) -> None:
        time = Fraction(self.end) if frame.pts is None else frame.pts * frame.time_base
        self._start = time if self._start is None else self._start
        self.origin = float(self._start)
        time -= self._start
        self.end = max(self.end, float(time) + self.frame_seconds)
        for (start, end), edges in self._edges.items():
            if start <= time < end:
                edges[1:] = [frame]

    def finish(self) -> np.ndarray | None:
        pictures = [[self._picture(edges[0]), self._picture(edges[-1])] for edges in self._edges.values() if edges]
        return np.stack([picture for pair in pictures for picture in pair]) if pictures else None


def _seconds(duration: Fraction) -> list[tuple[Fraction, Fraction]]:
    """Spans of one second; the last one ends with the picture, and thereby overlaps the one before it."""
    starts = [Fraction(k) for k in range(math.floor(duration))]
    if duration % 1 or not starts:
        starts.append(max(duration - 1, Fraction(0)))
    return [(start, start + 1) for start in starts]


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of ``count`` equal parts of frames 0 .. total - 1, as VideoLLaMA2 picks."""
    part = (total - 1) / count
    return [int(np.round(part * (2 * index + 1) / 2 + 1e-6)) for index in range(count)]


def _middles_of(count: int, total: int, rate: float) -> list[int]:
    return middles(total, count)


class _AudioReader:
    """Gets every decoded piece of sound, resamples it to mono float32."""

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate = sampling_rate
        self._resampler = av.AudioResampler(format="fltp", rate=sampling_rate)
        self._start: float | None = None
        self._pieces: list[np.ndarray] = []

    def add(self, frame: av.AudioFrame) -> None:
        if self._start is None:
            self._start = frame.time or 0.0
        self._extend(self._resampler.resample(frame))

    def finish(self, origin: float | None) -> np.ndarray | None:
        """The waveform, beginning at ``origin`` (seconds; None: where the sound begins)."""
        if self._start is None:
            return None
        self._extend(self._resampler.resample(None))
        waveform = np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.float32)
        shift = 0 if origin is None else round((self._start - origin) * self.sampling_rate)
        waveform = np.pad(waveform, (shift, 0)) if shift > 0 else waveform[-shift:]
        return np.ascontiguousarray(waveform, dtype=np.float32) if waveform.size else None

    def _extend(self, frames: list[av.AudioFrame]) -> None:
        # The mean of the channels, as models are trained on; FFmpeg's own mix is louder, up to clipping.
        self._pieces.extend(frame.to_ndarray().mean(axis=0) for frame in frames)


def _is_cover_picture(stream: av.VideoStream) -> bool:
    """Music files carry their cover as a video stream of one picture."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _count_packets(container: av.container.InputContainer, video: av.VideoStream) -> int:
    """Frames of the stream, for each packet holds one. Reads the file without decoding it."""
    return max(sum(1 for packet in _packets(container, [video]) if packet.size), 1)


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


def _check_above_zero(**arguments: float) -> None:
    for name, value in arguments.items():
        if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if name != "fps" and value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
