"""The sound of a clip as one waveform."""

from __future__ import annotations

import av
import numpy as np

# A stamp this much later than the sound before it ends: something is missing. Less is the rounding of a file's clock.
GAP_S = 0.1


class SoundReader:
    """Gets every decoded piece of sound, makes one mono float32 waveform of them; what is missing between is silent.

    The mean of the channels, as models are trained on. FFmpeg's own mix is louder, up to clipping.

    Args:
        sampling_rate: of the waveform, samples per second.
    """

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate = sampling_rate
        self.channels = 0  # the most that a piece had
        self._kind: tuple | None = None  # of the pieces: what a resampler is made for
        self._resampler: av.AudioResampler | None = None
        self._start = self._end = 0.0  # seconds on the file's clock: of the first piece, behind the last
        self._pieces: list[np.ndarray] = []

    def add(self, frame: av.AudioFrame) -> None:
        time = frame.time
        if self._resampler is None:
            self._start = self._end = time or 0.0
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        gap = 0.0 if time is None else time - self._end
        if kind != self._kind or gap > GAP_S:
            self._drain()
            self._kind, self._resampler = kind, av.AudioResampler(format="fltp", rate=self.sampling_rate)
            self.channels = max(self.channels, frame.layout.nb_channels)
        if gap > GAP_S:
            self._pieces.append(np.zeros(round(gap * self.sampling_rate), np.float32))
            self._end = time
        self._end += frame.samples / frame.sample_rate
        self._extend(self._resampler.resample(frame))

    def finish(self, origin: float | None) -> np.ndarray | None:
        """float32 [samples] from ``origin`` on (seconds on the file's clock; None: where the sound begins); None: no
        sound came, or none from there on."""
        if self._resampler is None:
            return None
        self._drain()
        waveform = np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.float32)
        shift = 0 if origin is None else round((self._start - origin) * self.sampling_rate)
        waveform = np.pad(waveform, (shift, 0)) if shift > 0 else waveform[-shift:]
        return np.ascontiguousarray(waveform, dtype=np.float32) if waveform.size else None

    def _drain(self) -> None:
        if self._resampler is not None:
            self._extend(self._resampler.resample(None))

    def _extend(self, frames: list[av.AudioFrame]) -> None:
        self._pieces.extend(frame.to_ndarray().mean(axis=0) for frame in frames)
