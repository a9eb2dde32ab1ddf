"""What happens in a clip, drawn by a seed, and its picture and sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from fmd_ext.lab.synthetic.kinds import KINDS

SECONDS = 2.0
FRAME_RATE = 10
AUDIO_RATE = 16000
WIDTH, HEIGHT = 112, 84
NOISE = (-2.5, -0.6)  # decades of the noise's deviation; that of a sound is about 0.1 to 0.4
SIDES = ("left", "right")

# How picture and sound belong together. "matched": everything seen is heard and nothing else.
RELATIONS = ("matched", "silent", "off-screen", "swapped")

# Seeds of clips, so that no clip of one split can turn up in another.
SPLITS: dict[str, range] = {
    "train": range(0, 1_000_000),
    "val": range(1_000_000, 2_000_000),
    "test": range(2_000_000, 3_000_000),
    "demo": range(3_000_000, 4_000_000),  # the clips that come with the package, and those that the demo makes
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is in a clip.

    Args:
        seen: kind on the left and on the right, None where there is nothing. The two may be of one kind.
        heard: the kinds that sound, each once, in the order of ``KINDS``; at most two.
        relation: one of ``RELATIONS``.
        seed: of everything else: sizes, colours, pitches, noise.
    """

    seen: tuple[str | None, str | None]
    heard: tuple[str, ...]
    relation: str
    seed: int

    @property
    def visible(self) -> tuple[str, ...]:
        """The kinds that are seen, each once, in the order of ``KINDS``."""
        return ordered(kind for kind in self.seen if kind)


def ordered(kinds: Iterable[str]) -> tuple[str, ...]:
    """Each kind once, in the order of ``KINDS``."""
    present = set(kinds)
    return tuple(kind for kind in KINDS if kind in present)


def scene_of(seed: int, relation: str | None = None) -> Scene:
    """The scene that belongs to a seed; ``relation`` None draws one, each equally likely.

    * matched: one or two objects, all of them heard.
    * silent: one or two objects, of which only some are heard, or none.
    * off-screen: none or one object, and a kind that is heard and not seen beside what is seen.
    * swapped: one or two kinds seen, as many others heard.
    """
    rng = np.random.default_rng([seed, 0])
    relation = relation or str(rng.choice(RELATIONS))
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    kinds = [str(kind) for kind in rng.permutation(list(KINDS))]
    if relation == "off-screen":
        shown, heard = kinds[: rng.integers(0, 2)], None
        heard = [*shown, kinds[2]]
    elif relation == "silent":
        shown = kinds[: rng.integers(1, 3)]
        heard = shown[1:]
    else:
        shown = kinds[: rng.integers(1, 3)]
        heard = kinds[2 : 2 + len(shown)] if relation == "swapped" else shown
    places: list[str | None] = list(shown) + [None] * (2 - len(shown))
    if len(shown) == 1 and rng.random() < 0.3:
        places = [shown[0], shown[0]]  # a pair of one kind, for the counts
    if rng.random() < 0.5:
        places.reverse()
    return Scene((places[0], places[1]), ordered(heard), relation, seed)


def draw_picture(seen: Sequence[str | None], seed: int, seconds: float = SECONDS) -> np.ndarray:
    """uint8 [frames, HEIGHT, WIDTH, 3] at FRAME_RATE: the objects in their halves over a dark, noisy gradient."""
    rng = np.random.default_rng([seed, 1])
    time = np.arange(max(1, round(seconds * FRAME_RATE))) / FRAME_RATE
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    slope = rng.uniform(-1, 1, 2)
    light = 0.5 + 0.5 * (slope[0] * (x / WIDTH - 0.5) + slope[1] * (y / HEIGHT - 0.5))
    ground = light[..., None] * rng.uniform(10, 90, 3) + rng.normal(0, 6, (HEIGHT, WIDTH, 1))
    frames = np.repeat(ground[None].astype(np.float32), len(time), axis=0)
    for side, name in zip((0.27, 0.73), seen, strict=True):
        if name is None:
            continue
        kind = KINDS[name]
        size = rng.uniform(11, 17)
        centre_x = WIDTH * side + rng.uniform(-6, 6)
        centre_y = HEIGHT / 2 + rng.uniform(-10, 10)
        move_x, move_y = kind.motion(time + rng.uniform(0, 5))
        own_x = (x - centre_x)[None] / size - move_x[:, None, None]
        own_y = (y - centre_y)[None] / size - move_y[:, None, None]
        colour = np.array(kind.colour) * rng.uniform(0.7, 1.05) + rng.uniform(-18, 18, 3)
        frames[kind.shape(own_x, own_y)] = colour
    return np.clip(frames, 0, 255).astype(np.uint8)


def draw_sound(heard: Sequence[str], seed: int, seconds: float = SECONDS) -> np.ndarray:
    """float32 [samples] in [-1, 1] at AUDIO_RATE: the kinds mixed, over noise of varying strength."""
    rng = np.random.default_rng([seed, 2])
    time = np.arange(max(1, round(seconds * AUDIO_RATE))) / AUDIO_RATE
    wave = np.zeros(len(time))
    for name in heard:
        pitch, tempo, start = rng.uniform(0.9, 1.1), rng.uniform(0.85, 1.15), rng.uniform(0, 3)
        wave += rng.uniform(0.5, 1.0) * KINDS[name].sound(time + start, pitch, tempo, rng)
    noise = rng.standard_normal(len(time))
    wave += 10 ** rng.uniform(*NOISE) * noise
    return np.clip(0.4 * rng.uniform(0.6, 1.0) * wave, -1, 1).astype(np.float32)
