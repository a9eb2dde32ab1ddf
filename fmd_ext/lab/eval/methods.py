"""The decoding methods that an evaluation compares: one table, and how a command line writes an entry with settings.

A method is a context manager around ``model.generate``: within it the same call decodes by that method. So every
method gets the same prompts, the same generation arguments and the same cached decoding.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fmd_ext
from fmd_ext.config import FMDConfig

Apply = Callable[..., contextlib.AbstractContextManager[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Passes:
    """What a method computes, in forward calls of the model for a batch; seconds say the rest.

    Args:
        prompt: how many prompts with a clip are run for an answer.
        token: forward calls for each further token.
        note: where it is more or less than that.
    """

    prompt: int = 1
    token: int = 1
    note: str = ""

    def __str__(self) -> str:
        said = f"{self.prompt} prefill{'s' * (self.prompt != 1)}, {self.token} pass{'es' * (self.token != 1)} per token"
        return f"{said} ({self.note})" if self.note else said


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the table.

    Args:
        name: lower case, words joined by hyphens.
        summary: one line for people who choose.
        source: where the method comes from, and what differs here.
        apply: ``apply(model, **settings)`` gives a context in which ``model.generate`` uses the method, for any batch,
            greedy or sampling. The context's value holds all settings in force, as JSON would. It must leave the model
            as it was, also after an error.
        settings: the settings that ``apply`` takes, each with what it means.
        passes: what it costs, with its default settings.
        needs_processor: ``apply`` takes the model's processor too, as ``processor``.
    """

    name: str
    summary: str
    source: str
    apply: Apply
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    passes: Passes = Passes()
    needs_processor: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method with settings, as chosen for a run: ``fmd-zero:fork_layers=7:alpha=0.9``."""

    method: Method
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The same text that `parse_methods` takes."""
        return ":".join([self.method.name, *(f"{name}={_written(self.settings[name])}" for name in self.settings)])

    @property
    def _needs_processor(self) -> bool:
        asks = "text_weight" in self.settings and FMDConfig(text_weight=self.settings["text_weight"]).asks
        return self.method.needs_processor or asks

    def applied(self, model: Any, processor: Any = None) -> contextlib.AbstractContextManager[Mapping[str, Any]]:
        """A context in which ``model.generate`` uses the method; its value holds all settings in force.

        Raises ValueError where the method needs the model's processor and none is given.
        """
        if not self._needs_processor:
            return self.method.apply(model, **self.settings)
        if processor is None:
            raise ValueError(f"method {self.method.name} reads prompts: it needs the model's processor")
        return self.method.apply(model, processor=processor, **self.settings)

    def with_defaults(self, settings: Mapping[str, Any]) -> Choice:
        """The same with further settings, where the method takes them and they are not chosen already."""
        taken = {k: v for k, v in settings.items() if k in self.method.settings and k not in self.settings}
        return Choice(self.method, {**taken, **self.settings})


def parse_methods(text: str) -> list[Choice]:
    """Reads ``vanilla,fmd-zero:alpha=0.9,fmd-attention:fork_layers=2``: methods by commas, settings by colons.

    A value is a Python literal, otherwise a word: ``alpha={"visual":0.9,"audio":0.5}``, ``alpha=auto``.
    Raises ValueError naming an unknown method or setting, and what is known.
    """
    choices = [_parse(part) for part in re.split(r",(?=\s*[A-Za-z])(?![^{\[]*[}\]])", text)]
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"method {name} is named twice")
    return choices


def _parse(text: str) -> Choice:
    name, *pairs = re.split(r":(?=\w+=)", text.strip())
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    method, settings = METHODS[name], {}
    for pair in pairs:
        key, value = pair.split("=", 1)
        if key not in method.settings:
            known = ", ".join(method.settings) or "none"
            raise ValueError(f"method {name} has no setting {key!r}; its settings are: {known}")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return Choice(method, settings)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else repr(value).replace(" ", "")


@contextlib.contextmanager
def _vanilla(model: Any) -> Iterator[Mapping[str, Any]]:
    if fmd_ext.handle_of(model) is not None:
        raise ValueError("the model is patched already; vanilla decoding needs it unpatched")
    yield {}


def _fork_merge(fixed: Mapping[str, Any]) -> Apply:
    """``fixed``: settings of the method; those that it is given win."""

    @contextlib.contextmanager
    def apply(model: Any, processor: Any = None, **settings: Any) -> Iterator[Mapping[str, Any]]:
        with fmd_ext.patch(model, FMDConfig(**{**fixed, **settings}), processor=processor) as handle:
            yield dataclasses.asdict(handle.config)

    return apply


def _baseline(name: str) -> Apply:
    """``name``: of a context in `fmd_ext.lab.baselines`, which is loaded when it is applied: it takes transformers."""

    @contextlib.contextmanager
    def apply(model: Any, **settings: Any) -> Iterator[Mapping[str, Any]]:
        context = getattr(importlib.import_module("fmd_ext.lab.baselines"), name)
        parameters = list(inspect.signature(context).parameters.values())[1:]
        defaults = {p.name: p.default for p in parameters if p.name != "processor"}
        with context(model, **settings):
            yield {**defaults, **{name: value for name, value in settings.items() if name != "processor"}}

    return apply


_FMD_SETTINGS = {
    "fork_layers": "decoder layers that run once per branch",
    "masking": "zero or attention: how a branch loses the other modality",
    "mask_scale": "factor on masked embeddings (zero masking)",
    "alpha": "merge weight: a number, or one per modality",
    "text_weight": "weight of the visual branch at text positions; auto: by what the question needs",
}
_FMD_SOURCE = "Jung et al., arXiv 2505.20873; docs/method.md says what is the paper's and what is ours"


_FMD_PASSES = Passes(note="more rows in the fork layers")


def _fmd_method(name: str, summary: str, fixed: Mapping[str, Any], without: tuple[str, ...]) -> Method:
    settings = {key: text for key, text in _FMD_SETTINGS.items() if key not in without}
    passes = dataclasses.replace(_FMD_PASSES, note=f"{_FMD_PASSES.note}; a short pass per new question, text only")
    if "text_weight" not in fixed:
        return Method(name, summary, _FMD_SOURCE, _fork_merge(fixed), settings, _FMD_PASSES)
    return Method(name, summary, _FMD_SOURCE, _fork_merge(fixed), settings, passes, needs_processor=True)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("vanilla", "the model as it is, with its KV cache", "the model's own", _vanilla),
        _fmd_method("fmd", "fork-merge decoding with the model's default settings", {}, ()),
        _fmd_method("fmd-zero", "fork-merge decoding, zero masking (the paper's)", {"masking": "zero"}, ("masking",)),
        _fmd_method(
            "fmd-attention",
            "fork-merge decoding, attention masking (ours)",
            {"masking": "attention"},
            ("masking", "mask_scale", "alpha"),
        ),
        _fmd_method(
            "fmd-routed",
            "fork-merge decoding, attention masking, branches weighed by what the question needs (ours)",
            {"masking": "attention", "text_weight": "auto"},
            ("masking", "mask_scale", "alpha"),
        ),
        Method(
            "vcd",
            "visual contrastive decoding: contrast with a noised video",
            "Leng et al., arXiv 2311.16922; fmd_ext/lab/baselines/vcd.py says what differs",
            _baseline("vcd"),
            {
                "contrast": "its strength",
                "beta": "plausibility of a token, relative to the likeliest",
                "noise_step": "0 to 999: how far the features are diffused",
                "modalities": 'which features: ("visual",), ("audio",) or ("visual", "audio")',
                "seed": "of the noise",
            },
            Passes(2, 2),
        ),
        Method(
            "avcd",
            "audio-visual contrastive decoding: contrast with the less dominant modalities hidden",
            "Jung et al., arXiv 2505.20862; fmd_ext/lab/baselines/avcd.py says what differs",
            _baseline("avcd"),
            {
                "contrast": "its strength",
                "beta": "plausibility of a token, relative to the likeliest",
                "min_entropy": "in nats: steps below it are decoded plainly",
            },
            Passes(4, 4, "a step below min_entropy is 1"),
        ),
        Method(
            "pai",
            "attention reweighting: attention to the clip raised, contrast with a run without it",
            "Liu et al., arXiv 2407.21771; fmd_ext/lab/baselines/pai.py says what differs",
            _baseline("pai"),
            {
                "boost": "how much attention scores are raised, relative to themselves",
                "gamma": "strength of the contrast; 1: none",
                "beta": "plausibility of a token, relative to the likeliest",
                "first_layer": "the layers before it are left alone",
                "modalities": 'whose positions are raised: ("visual",), ("audio",) or both',
            },
            Passes(2, 2, "1 and 1 with gamma=1"),
        ),
        Method(
            "mad",
            "modality-adaptive decoding: four runs weighed by the model's answer to what the question needs",
            "Chung et al., arXiv 2601.21181; fmd_ext/lab/baselines/mad.py says what differs",
            _baseline("mad"),
            {
                "gamma": "strength of the contrast",
                "wording": "how the model is asked: published, or a language of MODALITY_QUESTIONS",
            },
            Passes(5, 4, "one prefill asks"),
            needs_processor=True,
        ),
        Method(
            "outro",
            "attention outputs turned towards the values of attention sinks; acts only where there are sinks",
            "Yoo et al., arXiv 2603.14337; fmd_ext/lab/baselines/outro.py says what differs",
            _baseline("outro"),
            {
                "least": "magnitude of a hidden state that makes a sink",
                "ratio": "the same, relative to the median",
                "gamma": "how far outputs are turned",
                "temperature": "how soon a turn is a full one",
            },
        ),
        Method(
            "drop",
            "a control: the prompt loses the modality that its question does not need",
            "no published method; fmd_ext/lab/baselines/drop.py",
            _baseline("drop"),
            {
                "needs": "asked, or visual, audio or both for all questions",
                "wording": "how the model is asked: a language of MODALITY_QUESTIONS",
            },
            Passes(note="with needs=asked a short pass per question besides, text only"),
            needs_processor=True,
        ),
    )
}
