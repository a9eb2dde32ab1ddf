"""The kinds of objects: each has its own look (shape, colour, motion) and its own sound (timbre, rhythm)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Kind(NamedTuple):
    """One kind of object.

    Args:
        colour: RGB in 0..255, the middle of its range.
        shape: (x, y) in units of the object's size -> inside or not.
        motion: seconds -> offset (x, y) in units of the object's size.
        sound: (seconds float [samples], pitch factor, tempo factor, rng) -> waveform in about [-1, 1].
    """

    colour: tuple[int, int, int]
    shape: Callable[[Array, Array], Array]
    motion: Callable[[Array], tuple[Array, Array]]
    sound: Callable[[Array, float, float, np.random.Generator], Array]


def _since_beat(time: Array, rate: float) -> Array:
    """Seconds since the latest of ``rate`` beats per second."""
    return np.mod(time, 1 / rate)


def _tone(time: Array, hertz: float | Array, partials: dict[float, float]) -> Array:
    return sum(weight * np.sin(2 * np.pi * ratio * hertz * time) for ratio, weight in partials.items())


def _bell(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    ring = np.exp(-5 * _since_beat(time, 1.5 * tempo))
    return ring * _tone(time, 740 * pitch, {1.0: 0.4, 2.0: 0.3, 2.76: 0.25, 5.4: 0.15})


def _drum(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    beat = _since_beat(time, 4 * tempo)
    skin = np.sin(2 * np.pi * 110 * pitch * beat) * np.exp(-18 * beat)
    return 0.9 * skin + 0.3 * rng.standard_normal(len(time)) * np.exp(-60 * beat)


def _siren(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    # The phase is the integral of 800 + 350 sin(2 pi f t) hertz.
    sweep = tempo
    phase = 800 * time - 350 / (2 * np.pi * sweep) * np.cos(2 * np.pi * sweep * time)
    return 0.5 * np.sin(2 * np.pi * pitch * phase) + 0.2 * np.sin(6 * np.pi * pitch * phase)


def _bird(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    beat = _since_beat(time, 5 * tempo)
    chirp = np.sin(2 * np.pi * pitch * (3200 * beat + 4500 * beat**2))
    return 0.6 * chirp * (beat < 0.1 / tempo)


def _clock(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    beat = _since_beat(time, 2 * tempo)
    return 0.9 * np.sin(2 * np.pi * 2000 * pitch * beat) * np.exp(-70 * beat)


def _motor(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    hum = 2 * np.mod(85 * pitch * time, 1.0) - 1  # a sawtooth
    return 0.45 * hum * (1 + 0.3 * np.sin(2 * np.pi * 13 * tempo * time))


def _flute(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    vibrato = 0.004 / tempo * np.sin(2 * np.pi * 5 * tempo * time)
    return 0.5 * _tone(time + vibrato / 5, 1250 * pitch, {1.0: 0.9, 2.0: 0.12})


def _frog(time: Array, pitch: float, tempo: float, rng: np.random.Generator) -> Array:
    croak = _since_beat(time, 2.5 * tempo) < 0.22 / tempo
    return 0.7 * croak * np.sin(2 * np.pi * 380 * pitch * time) * (np.sin(2 * np.pi * 32 * time) > 0)


def _wave(hertz: float, x: float, y: float) -> Callable[[Array], tuple[Array, Array]]:
    return lambda time: (x * np.sin(2 * np.pi * hertz * time), y * np.sin(2 * np.pi * hertz * time))


def _hops(hertz: float, height: float) -> Callable[[Array], tuple[Array, Array]]:
    return lambda time: (0 * time, -height * np.abs(np.sin(np.pi * hertz * time)))


def _orbit(hertz: float, radius: float) -> Callable[[Array], tuple[Array, Array]]:
    return lambda time: (radius * np.cos(2 * np.pi * hertz * time), radius * np.sin(2 * np.pi * hertz * time))


KINDS: dict[str, Kind] = {
    "bell": Kind((235, 200, 40), lambda x, y: (np.abs(x) < (y + 1) / 2) & (y < 1), _wave(1.0, 0.4, 0.0), _bell),
    "drum": Kind((215, 40, 40), lambda x, y: x**2 + y**2 < 1, _hops(2.0, 0.6), _drum),
    "siren": Kind((40, 80, 230), lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.85, _wave(0.5, 0.3, 0.3), _siren),
    "bird": Kind((50, 190, 60), lambda x, y: np.abs(x) + np.abs(y) < 1.1, _orbit(0.7, 0.4), _bird),
    "clock": Kind((235, 235, 235), lambda x, y: np.abs(np.hypot(x, y) - 0.75) < 0.28, _wave(0.0, 0.0, 0.0), _clock),
    "motor": Kind((235, 130, 30), lambda x, y: (np.abs(x) < 1.1) & (np.abs(y) < 0.45), _wave(5.0, 0.12, 0.12), _motor),
    "flute": Kind((190, 60, 210), lambda x, y: (np.abs(x) < 0.38) & (np.abs(y) < 1.15), _wave(0.6, 0.0, 0.4), _flute),
    "frog": Kind(
        (40, 200, 205),
        lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.33) & (np.maximum(np.abs(x), np.abs(y)) < 1),
        _hops(1.2, 0.9),
        _frog,
    ),
}
