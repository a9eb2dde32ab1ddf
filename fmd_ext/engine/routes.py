"""What each question needs: a weight of its own at text positions, and whether its sample forks. docs/method.md
defines it; it is ours, not the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fmd_ext.config import FMDConfig
from fmd_ext.labels import JOINT, TEXT

NEEDS = ("visual", "audio", "both")


@dataclasses.dataclass(frozen=True)
class Routes:
    """One route per sample.

    Args:
        probabilities: float32 [batch, 3], each row's sum 1: how likely the question needs each of NEEDS.
        questions: [batch], what was asked about; None where a route was given by hand.

    Raises:
        ValueError: another shape, or a row that is no distribution.
    """

    probabilities: np.ndarray
    questions: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        given = np.asarray(self.probabilities, np.float32)
        if given.ndim != 2 or given.shape[1] != len(NEEDS):
            raise ValueError(f"routes must be [batch, {len(NEEDS)}] ({', '.join(NEEDS)}), got {list(given.shape)}")
        if not (np.isfinite(given).all() and (given >= 0).all() and np.allclose(given.sum(1), 1, atol=1e-3)):
            raise ValueError(
                f"each route must be probabilities of {', '.join(NEEDS)} with the sum 1, got {given.tolist()}"
            )
        object.__setattr__(self, "probabilities", given)
        object.__setattr__(self, "questions", tuple(self.questions) or (None,) * len(given))
        if len(self.questions) != len(given):
            raise ValueError(f"{len(self.questions)} questions for {len(given)} routes")

    @classmethod
    def needing(cls, needs: Sequence[str]) -> Routes:
        """Certain routes, by name: one of NEEDS for each sample."""
        for need in needs:
            if need not in NEEDS:
                raise ValueError(f"a question needs one of {', '.join(NEEDS)}; got {need!r}")
        return cls(np.eye(len(NEEDS), dtype=np.float32)[[NEEDS.index(need) for need in needs]])

    def __len__(self) -> int:
        return len(self.probabilities)

    def text_weights(self, config: FMDConfig) -> np.ndarray:
        """float32 [batch]: the weight of the visual branch, the mean over NEEDS of what ``config`` gives each.

        That is 1, 0 and 0.5, unless its ``text_weight`` names others for "visual" and "audio".
        """
        own = config.text_weight if isinstance(config.text_weight, Mapping) else {"visual": 1.0, "audio": 0.0}
        return self.probabilities @ np.array([own["visual"], own["audio"], 0.5], np.float32)

    @property
    def forks(self) -> np.ndarray:
        """bool [batch]: False where "both" is the likeliest: such a sample is computed as by the unpatched model."""
        return self.probabilities.argmax(1) != NEEDS.index("both")

    def settings(self, config: FMDConfig) -> list[FMDConfig]:
        """What ``config`` comes to for each sample: with its own text weight, or with nothing forked."""
        return [
            config.replace(text_weight=float(weight)) if forks else config.replace(text_weight=0.5, fork_layers=0)
            for weight, forks in zip(self.text_weights(config), self.forks, strict=True)
        ]

    def repeated(self, batch: int) -> Routes:
        """For a call of ``batch`` samples, repeated as `generate` repeats samples.

        Raises ValueError where ``batch`` is no multiple of the routes.
        """
        if len(self) == batch:
            return self
        if batch % len(self):
            raise ValueError(f"there are routes for {len(self)} samples, the call has {batch}")
        index = np.arange(len(self)).repeat(batch // len(self))
        return Routes(self.probabilities[index], tuple(self.questions[i] for i in index))

    def home_weights(self, config: FMDConfig, weights: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Home row weights [batch, 4] of the merge: those of the settings [4], or of calls ``before`` [batch, 4], with
        the samples' own weight at text and joint positions."""
        chosen = (weights.repeat(len(self), 1) if before is None else before).clone()
        own = torch.from_numpy(self.text_weights(config)).to(chosen)
        chosen[:, TEXT] = chosen[:, JOINT] = own
        return chosen
