"""Which frames of a picture are kept, and how they are taken out of the stream while it is decoded.

A picture's `Timeline` comes from its packets, before anything is decoded: what a container or a stream says about its
own length is often another stream's, or wrong. A rule turns a timeline into the numbers of the frames to keep.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import av
import av.sidedata.sidedata
import numpy as np

# A time stamp is rounded to the time base of its file: it may lie this much behind the time that it stands for.
ROUNDING_S = 5e-7


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When each frame of a picture is shown.

    Args:
        stamps: time stamps of the frames in units of ``unit``, ascending, at least one; frames without a time of their
            own have their numbers.
        unit: seconds.
        end: where the last frame ends, in units.
        rate: frames per second, as the stream says.
        timed: decoded frames carry these stamps, and the stamps of the sound are of the same clock.
    """

    stamps: Sequence[int]
    unit: Fraction
    end: int
    rate: float
    timed: bool = True

    @classmethod
    def of_packets(cls, packets: Iterable[av.Packet], stream: av.VideoStream) -> Timeline | None:
        """Reads the packets, each of which holds a frame; None: there are none."""
        rate = stream.average_rate or Fraction(25)
        shown = [(packet.pts, packet.duration) for packet in packets if packet.size and not packet.is_discard]
        timed = [(pts, duration) for pts, duration in shown if pts is not None]
        if not timed:
            numbers = range(len(shown))
            return cls(numbers, 1 / rate, len(shown), float(rate), timed=False) if shown else None
        in_order = sorted(timed)
        last, duration = in_order[-1]
        end = last + (duration or max(round(1 / rate / stream.time_base), 1))
        # Frames that must be reordered, with stamps that never go back: AVI counts packets, not what is shown.
        counts_packets = stream.codec_context.has_b_frames and in_order == timed
        return cls([pts for pts, _ in in_order], stream.time_base, end, float(rate), timed=not counts_packets)

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame to the end of the last."""
        return (self.end - self.stamps[0]) * self.unit

    @property
    def origin(self) -> float | None:
        """Seconds at which the picture begins, on the clock of the file."""
        return float(self.stamps[0] * self.unit) if self.timed else None


@dataclasses.dataclass(frozen=True)
class FrameChoice:
    """Which frames `load_clip` keeps; the arguments are explained there.

    Raises ValueError for an argument out of range, and for two rules at once.
    """

    fps: float = 2.0
    max_frames: int = 768
    num_frames: int | None = None
    edge_seconds: int | None = None
    pick: Callable[[int, float], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_above_zero(fps=self.fps, max_frames=self.max_frames)
        rules = {name: getattr(self, name) for name in ("num_frames", "edge_seconds", "pick")}
        given = {name: rule for name, rule in rules.items() if rule is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        given.pop("pick", None)
        check_above_zero(**given)

    def numbers_of(self, timeline: Timeline) -> tuple[list[int], float]:
        """The numbers of the frames, and how many of them are shown per second."""
        seconds, total = float(timeline.duration), len(timeline.stamps)
        if self.edge_seconds is not None:
            return edges(timeline, int(self.edge_seconds)), 2.0
        if self.num_frames is not None or self.pick is not None:
            count = self.num_frames
            numbers = list(self.pick(total, timeline.rate) if count is None else middles(total, int(count)))
            return numbers, len(numbers) / seconds
        fps = min(float(self.fps), self.max_frames / seconds)
        return evenly(timeline, fps, int(self.max_frames)), fps


def evenly(timeline: Timeline, fps: float, max_frames: int) -> list[int]:
    """Numbers of the frames on show at times k / fps, counted from the first frame."""
    due = min(math.ceil((float(timeline.duration) - ROUNDING_S) * fps), max_frames)
    times = (np.array(timeline.stamps) - timeline.stamps[0]) * float(timeline.unit)
    return (np.searchsorted(times, np.arange(max(due, 1)) / fps + ROUNDING_S, side="right") - 1).tolist()


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of ``count`` equal parts of frames 0 .. total - 1, as VideoLLaMA2 picks."""
    part = (total - 1) / count
    return [int(np.round(part * (2 * index + 1) / 2 + 1e-6)) for index in range(count)]


def edges(timeline: Timeline, seconds: int) -> list[int]:
    """Numbers of the first and the last frame of each of at most so many first seconds; none of a second without."""
    numbers: list[int] = []
    for span in each_second(timeline.duration)[:seconds]:
        ticks = (timeline.stamps[0] + math.ceil(time / timeline.unit) for time in span)
        first, behind = (bisect.bisect_left(timeline.stamps, tick) for tick in ticks)
        numbers += [first, behind - 1] if first < behind else []
    return numbers


def each_second(duration: Fraction) -> list[tuple[Fraction, Fraction]]:
    """Spans of one second; the last one ends with the picture, and thereby overlaps the one before it."""
    starts = [Fraction(k) for k in range(math.floor(duration))]
    if duration % 1 or not starts:
        starts.append(max(duration - 1, Fraction(0)))
    return [(start, start + 1) for start in starts]


class FrameReader:
    """Gets every decoded frame in the order of display, keeps those with the given numbers.

    A frame that is wanted and does not come, since its packet is damaged, is the one that a player would still show.
    """

    def __init__(self, timeline: Timeline, numbers: Sequence[int], max_pixels: int) -> None:
        self._timeline, self._numbers, self._max_pixels = timeline, numbers, max_pixels
        self._wanted = sorted(set(numbers))
        self._stamped = timeline.timed
        self._count = 0  # frames that came
        self._latest: av.VideoFrame | None = None
        self._latest_stamp = -math.inf
        self._kept: list[np.ndarray] = []  # of the first wanted numbers

    def add(self, frame: av.VideoFrame) -> None:
        self._keep_before(self._number_of(frame))
        self._latest = frame

    def finish(self) -> np.ndarray | None:
        """uint8 [numbers, H, W, 3]; None: no frame came."""
        self._keep_before(math.inf)
        kept = dict(zip(self._wanted, self._kept, strict=False))
        return np.stack([kept[number] for number in self._numbers]) if kept else None

    def _number_of(self, frame: av.VideoFrame) -> int:
        """By the frame's time stamp; by counting from the first one on that has none, or an earlier one than before."""
        stamps = self._timeline.stamps
        stamp = None if frame.pts is None else round(frame.pts * frame.time_base / self._timeline.unit)
        self._stamped = self._stamped and stamp is not None and stamp >= self._latest_stamp
        self._count += 1
        if not self._stamped:
            return self._count - 1
        self._latest_stamp = stamp
        return bisect.bisect_right(stamps, stamp) - 1

    def _keep_before(self, number: float) -> None:
        """Keeps the latest frame for every wanted number below ``number``."""
        if self._latest is None:
            return
        due = bisect.bisect_left(self._wanted, number) - len(self._kept)
        if due > 0:
            self._kept += [self._picture(self._latest)] * due

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3], upright; of the size of the frames before it, where the size changes within the stream."""
        matrix = _display_matrix(frame)
        scale = min(1.0, math.sqrt(self._max_pixels / (frame.width * frame.height)))
        width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        if self._kept:
            height, width = self._kept[0].shape[:2] if _keeps_axes(matrix) else self._kept[0].shape[1::-1]
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        return np.ascontiguousarray(_upright(image, matrix))


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """The linear part (a, b, c, d) of what takes a stored pixel (x, y) to where it is shown, (ax + cy, bx + dy).

    Phones store pictures as the sensor sees them, with this matrix beside them (libavutil/display.h).
    """
    found = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if found is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(found, np.int32).tolist()
    return a, b, c, d


def _keeps_axes(matrix: tuple[int, int, int, int]) -> bool:
    return abs(matrix[0]) >= abs(matrix[1])


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The image [H, W, 3] turned by quarters and mirrored as the matrix says."""
    a, b, c, d = matrix
    if not _keeps_axes(matrix):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def check_above_zero(**arguments: float) -> None:
    """Raises ValueError for one that is no number above 0, or, but for ``fps``, no whole one."""
    for name, value in arguments.items():
        if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if name != "fps" and value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
