"""What an adapter says about a model family. It is data: no adapter has code of its own."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import nn

from fmd_ext.config import FMDConfig
from fmd_ext.labels import LABELS


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A placeholder token and the inputs whose features replace it.

    Args:
        modality: ``"visual"``, ``"audio"`` or ``"joint"``.
        token_id: name of the config attribute that holds the placeholder's id, dotted where it is a sub-config's.
        inputs: forward arguments that bring the features. ``"a.b"`` means key ``b`` of the dict argument ``a``. A
            placeholder without any of them in the call is an ordinary token, such as a generated one.

    Raises:
        ValueError: another modality.
        TypeError: ``inputs`` is no tuple of names.
    """

    modality: str
    token_id: str
    inputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.modality not in ("visual", "audio", "joint"):
            raise ValueError(f"modality {self.modality!r}: accepted are 'visual', 'audio' and 'joint'")
        _check_names(self, "inputs")

    def is_fed_by(self, call: dict[str, Any]) -> bool:
        for name in self.inputs:
            argument, _, key = name.partition(".")
            value = call.get(argument)
            if key and value is not None:
                value = value.get(key)
            if value is not None:
                return True
        return False


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Where a model family keeps what fork-merge decoding touches. Paths are dotted attribute names.

    Args:
        name: shown to users.
        model_types: ``config.model_type`` values that the adapter serves.
        entry: candidate paths from the model to the module whose ``forward`` and ``generate`` take token ids
            (``""`` is the model itself).
        decoder: candidate paths from the entry to the text decoder: the module with ``layers``, ``norm`` and
            ``rotary_emb``. Where transformers moved it, both places are listed; the first that exists is taken.
        sources: placeholder tokens of the branch modalities; none means that labels are always given by hand.
        defaults: settings for this family where they differ from the package's.
        attention: attribute of a decoder layer that holds its attention module.
        embed: module of a decoder that takes token ids and features itself. It is called with the ids, their
            embeddings and those of its other arguments that the decoder was given, and returns the embeddings with
            the features in place.
        deepstack: method of the decoders that add visual features to the hidden states after early layers. It takes the
            hidden states, a bool mask [batch, length] of the visual positions, and features [visual positions, hidden].
        branch_inputs: for channel-wise fusion, the entry's method that masks a modality before the two are joined.
            It takes ``mask_scale`` and the arguments of ``forward`` and returns those arguments with the features
            replaced by ``inputs_embeds`` [batch, length, hidden] and ``branch_embeds`` [2, batch, length, hidden]
            (visual branch, audio branch).
        rotary: name of the function by which the attention modules' source file rotates q and k, where it does so
            right before both go to the cache and to attention: the append then rotates. Empty: the model does.

    Raises:
        TypeError: an argument that must be a tuple is none.
    """

    name: str
    model_types: tuple[str, ...]
    entry: tuple[str, ...]
    decoder: tuple[str, ...]
    sources: tuple[TokenSource, ...] = ()
    defaults: FMDConfig = FMDConfig()
    attention: str = "self_attn"
    embed: str = ""
    deepstack: str = "_deepstack_process"
    branch_inputs: str = ""
    rotary: str = ""

    def __post_init__(self) -> None:
        for name in ("model_types", "entry", "decoder"):
            _check_names(self, name)
        if not isinstance(self.sources, tuple) or not all(isinstance(source, TokenSource) for source in self.sources):
            raise TypeError(f"sources of {self.name} must be a tuple of TokenSource, got {self.sources!r}")

    def find_entry(self, model: nn.Module) -> nn.Module:
        return _first(model, self.entry, "forward")

    def find_decoder(self, model: nn.Module) -> nn.Module:
        """The text decoder of ``model``. Raises TypeError when it is not where the adapter says."""
        decoder = _first(self.find_entry(model), self.decoder, "layers")
        for name in ("layers", "norm", "rotary_emb"):
            if not hasattr(decoder, name):
                raise TypeError(f"the text decoder {type(decoder).__name__} has no attribute {name!r}")
        return decoder

    def labels_of(
        self, model: nn.Module, input_ids: torch.Tensor, call: dict[str, Any] | None = None
    ) -> torch.Tensor | None:
        """Modality labels, int8 [batch, length], of ``input_ids`` [batch, length].

        With ``call`` (the forward's arguments) only placeholders whose features are part of the call are labelled;
        None when there are none.
        """
        sources = [source for source in self.sources if call is None or source.is_fed_by(call)]
        if not sources:
            return None
        config = self.find_entry(model).config
        labels = torch.zeros(input_ids.shape, dtype=torch.int8, device=input_ids.device)
        for source in sources:
            labels.masked_fill_(input_ids == operator.attrgetter(source.token_id)(config), LABELS[source.modality])
        return labels


def _check_names(owner: Any, field: str) -> None:
    """A lone string would be read letter by letter."""
    names = getattr(owner, field)
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{field} of {type(owner).__name__} must be a tuple of strings, got {names!r}")


def _first(root: nn.Module, paths: tuple[str, ...], attribute: str) -> nn.Module:
    if hasattr(root, "get_base_model"):  # wrapped by PEFT
        root = root.get_base_model()
    for path in paths:
        module: Any = root
        for name in filter(None, path.split(".")):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module) and hasattr(module, attribute):
            return module
    raise TypeError(f"{type(root).__name__} has no module with {attribute!r} at any of {list(paths)}")
