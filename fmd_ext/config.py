"""What can be chosen about fork-merge decoding, and which values are legal."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

MODALITIES = ("visual", "audio")
MASKINGS = ("zero", "attention")
AUTO = "auto"
FILE_KEY = "fork_merge_decoding"  # under which a file holds the settings


@dataclasses.dataclass(frozen=True)
class FMDConfig:
    """The settings of fork-merge decoding (FMD, arXiv 2505.20873). ``None`` stands for the model's default.

    Args:
        fork_layers: decoder layers that run once per branch, 0 to the number of layers (the paper's L_fork).
            0 is the untouched model. The paper's values are not public; our default is a quarter of the layers.
            ``"auto"`` (ours): each call with a new prompt chooses, from its own attention; one depth for the batch.
        masking: how a branch loses the other modality. ``"zero"`` (the paper, default): its embeddings are multiplied
            by ``mask_scale`` and stay in the sequence. ``"attention"`` (ours): its positions are absent, nobody
            attends to them; a joint position has nothing to leave out, so it needs ``"zero"``.
        mask_scale: factor in [0, 1] on masked embeddings with ``masking="zero"``; 0 is the paper, more is soft masking.
        alpha: weight in [0, 1], at a position of a branch modality, of the branch in which it carries content; the
            branch in which it is masked gets ``1 - alpha``. One number, or ``{"visual": a, "audio": b}``. Without
            effect for ``masking="attention"``, where such a position exists in one branch only. Default 0.8: the
            paper's value for VideoLLaMA2; for other models a choice of ours.
            ``"auto"`` (ours): each sample chooses, for each modality, from its prompt's own attention.
        text_weight: weight in [0, 1] of the visual branch at text positions and at joint ones (which mix both
            modalities: channel-wise fusion), default 0.5 (a plain average).
            ``"auto"`` (ours): before its prompt, each sample has the model asked which modality its question needs,
            and that modality's branch alone counts; a sample that needs both does not fork. ``{"visual": w, "audio":
            w}``: the same with these weights for a question that needs the one or the other; "auto" is 1 and 0. 0.5
            for a call without a question to ask about.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is accepted.
    """

    fork_layers: int | str | None = None
    masking: str | None = None
    mask_scale: float | None = None
    alpha: float | str | Mapping[str, float] | None = None
    text_weight: float | str | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.fork_layers is not None and self.fork_layers != AUTO:
            object.__setattr__(self, "fork_layers", _layer_count(self.fork_layers))
        if self.masking is not None and self.masking not in MASKINGS:
            raise ValueError(f"masking must be one of {', '.join(map(repr, MASKINGS))}, got {self.masking!r}")
        if self.mask_scale is not None:
            object.__setattr__(self, "mask_scale", _unit_interval("mask_scale", self.mask_scale))
        for name in ("alpha", "text_weight"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                if set(value) != set(MODALITIES):
                    raise ValueError(f"{name} must have exactly the keys {list(MODALITIES)}, got {sorted(value)}")
                object.__setattr__(self, name, {m: _unit_interval(f"{name}[{m!r}]", value[m]) for m in MODALITIES})
            elif value is not None and value != AUTO:
                object.__setattr__(self, name, _unit_interval(name, value))
        if self.masking == "attention" and self.mask_scale:
            raise ValueError(
                f"mask_scale={self.mask_scale} has no meaning with masking='attention' (masked positions are absent); "
                "use masking='zero' for soft masking"
            )

    def __hash__(self) -> int:
        """Equal settings have one hash, weights per modality included."""
        return hash(tuple(tuple(sorted(v.items())) if isinstance(v, Mapping) else v for v in vars(self).values()))

    @classmethod
    def from_file(cls, path: str | Path) -> FMDConfig:
        """The settings in a file that `to_file` or ``fmd-ext calibrate`` has written; null or absent: the default.

        Raises:
            OSError: the file cannot be read.
            ValueError: no such file's content, an unknown setting, or a value out of range; the message names the file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        settings = content.get(FILE_KEY) if isinstance(content, dict) else None
        if not isinstance(settings, dict):
            raise ValueError(f'{path} holds no settings: {{"{FILE_KEY}": {{"alpha": 0.8, ...}}}} is expected')
        try:
            return cls().replace(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_file(self, path: str | Path, **more: Any) -> None:
        """Writes the settings as JSON, and beside them ``more``, which `from_file` does not read."""
        settings = {name: dict(v) if isinstance(v, Mapping) else v for name, v in vars(self).items()}
        Path(path).write_text(json.dumps({FILE_KEY: settings, **more}, indent=1) + "\n", encoding="utf-8")

    def replace(self, **overrides: Any) -> FMDConfig:
        """A copy with some fields changed. Raises TypeError for a name that is no field."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                raise TypeError(f"unknown FMD setting {name!r}; the settings are {', '.join(known)}")
        return dataclasses.replace(self, **overrides)

    def resolve(self, defaults: FMDConfig, num_layers: int) -> FMDConfig:
        """All fields filled: from ``self``, else from ``defaults``, else from the package's defaults.

        Raises ValueError when ``fork_layers`` exceeds ``num_layers``.
        """
        package = FMDConfig(max(1, num_layers // 4), "zero", 0.0, 0.8, 0.5)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            candidates = (getattr(source, field.name) for source in (self, defaults, package))
            values[field.name] = next(value for value in candidates if value is not None)
        if values["masking"] == "attention" and self.mask_scale is None:
            values["mask_scale"] = 0.0
        if values["fork_layers"] != AUTO and values["fork_layers"] > num_layers:
            given = values["fork_layers"]
            raise ValueError(f"fork_layers={given} is out of range: the decoder has {num_layers} layers")
        return FMDConfig(**values)

    @property
    def asks(self) -> bool:
        """Whether the weight at text positions is left to what each question needs."""
        return self.text_weight == AUTO or isinstance(self.text_weight, Mapping)

    @property
    def merge_weights(self) -> tuple[float, float, float, float]:
        """Home row weights (text, visual, audio, joint) in the merge; the config must be resolved.

        Those of an alpha that samples choose for themselves are nan. A text weight that they choose for themselves is
        0.5 here, which is what a sample gets whose question is not known.
        """
        text = 0.5 if self.asks else cast(float, self.text_weight)
        if self.alpha == AUTO:
            return (text, math.nan, math.nan, text)
        alpha: Mapping[str, Any]
        alpha = self.alpha if isinstance(self.alpha, Mapping) else dict.fromkeys(MODALITIES, self.alpha)
        return (text, alpha["visual"], alpha["audio"], text)


def _layer_count(value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"fork_layers must be a whole number or 'auto', got {value!r}") from None
    if count < 0:
        raise ValueError(f"fork_layers must be 0 or more, got {count}")
    return count


def _unit_interval(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        or_auto = " or 'auto'" if name in ("alpha", "text_weight") else ""
        raise TypeError(f"{name} must be a number in [0, 1]{or_auto}, got {value!r}") from None
    if math.isnan(number) or not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {number}")
    return number
