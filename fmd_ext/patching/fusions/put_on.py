"""Puts the fusions on a decoder and the encoders before it, each where it computes the same and is not slower, and says
where and why not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from fmd_ext.adapters import Adapter
from fmd_ext.patching.fusions import kept_logits, norms, products, rotary, row_chunks, windows
from fmd_ext.patching.installation import Installation
from fmd_ext.patching.refusals import attention_modules

NAMES = ("rotation", "norms", *products.GROUPS, "windows", "mlp_chunks", "kept_logits")

# Where products are joined without being asked for. On a CPU they pay little: docs/performance.md, "all fusions".
JOINED_ON = ("cuda",)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """One kind of fusion on a model.

    Args:
        places: modules that run by it.
        why_not: why the others do not; "" where none is left.
    """

    places: int
    why_not: str = ""

    def __str__(self) -> str:
        if not self.places:
            return f"off: {self.why_not}"
        return f"on in {self.places} modules" + (f"; not in others: {self.why_not}" if self.why_not else "")


def none_on(why: str) -> dict[str, Fusion]:
    return dict.fromkeys(NAMES, Fusion(0, why))


def put_on(
    put: Installation,
    entry: nn.Module,
    decoder: nn.Module,
    adapter: Adapter,
    wanted: bool | None,
    kept: kept_logits.KeptLogits,
) -> dict[str, Fusion]:
    """Puts fusions on; returns by name what was put on.

    Args:
        entry: the module that takes token ids; what is not its decoder's are encoders.
        wanted: True: all that compute the same; None: those of them that are not slower on the decoder's device;
            False: none.
        kept: through which the entry's forward takes ``logits_to_keep``, where the fusion of that name is on.
    """
    if wanted is False:
        return none_on("switched off by patch(..., fusions=False)")
    parts = (*decoder.layers, decoder.norm)
    found = {"rotation": _rotations(put, decoder, adapter), "norms": _norms(put, parts)}
    seen: set[int] = set()
    said: set[str] = set()
    for name, members in products.GROUPS.items():
        found[name] = _products(put, decoder.layers, members, wanted, seen, said)
    if any(found[name].places for name in products.GROUPS) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # blocks of the weights' former memory
    found["windows"] = _windows(put, entry, decoder)
    found["mlp_chunks"] = _mlp_chunks(put, entry)
    why_not = kept_logits.put_on(put, entry, kept)
    found["kept_logits"] = Fusion(int(not why_not), why_not)
    return found


def _windows(put: Installation, entry: nn.Module, decoder: nn.Module) -> Fusion:
    places, reasons = windows.put_on(put, entry, decoder)
    return Fusion(places, next(iter(reasons), "" if places else "the model has no encoder with windows"))


def _rotations(put: Installation, decoder: nn.Module, adapter: Adapter) -> Fusion:
    attention = [module for layer in decoder.layers for module in attention_modules(layer, adapter)]
    reasons = [rotary.why_not_fused(module, adapter.rotary) for module in attention]
    for module, reason in zip(attention, reasons, strict=True):
        if not reason:
            put.override(module, "forward", rotary.FusedRotation, adapter.rotary)
    return Fusion(reasons.count(""), next(filter(None, reasons), ""))


def _norms(put: Installation, parts: Iterable[nn.Module]) -> Fusion:
    plain = [module for part in parts for module in part.modules() if norms.is_plain(module)]
    for module in plain:
        put.override(module, "forward", norms.FusedNorm)
    return Fusion(len(plain), "" if plain else "the decoder has no plain RMS norm")


def _products(
    put: Installation,
    layers: Iterable[nn.Module],
    names: tuple[str, ...],
    wanted: bool | None,
    seen: set[int],
    said: set[str],
) -> Fusion:
    """``seen``: weights of linears that are joined already, by their identity. ``said``: see `JoinedLinears`."""
    places, reasons = 0, []
    tried: dict[tuple, str] = {}
    for parent in (parent for layer in layers for parent in products.groups_in(layer, names)):
        members = tuple(parent._modules[name] for name in names)
        why = products.why_not_joined(parent, names) or _why_not_here(members, wanted, seen)
        if not why:
            group = products.JoinedLinears(members, said)
            put.on_removal(group.split)
            group.join()
            kind = (tuple(member.weight.shape for member in members), members[0].weight.dtype)
            if kind not in tried:
                tried[kind] = group.differs()
            if why := tried[kind]:
                group.split()
        if why:
            reasons.append(why)
            continue
        places += 1
        seen.update(id(member.weight) for member in members)
        for index, member in enumerate(members):
            put.override(member, "forward", products.JoinedLinear, group, index)
    if not places and not reasons:
        return Fusion(0, f"no module has {', '.join(names)}")
    return Fusion(places, next(iter(reasons), ""))


def _why_not_here(members: tuple[nn.Module, ...], wanted: bool | None, seen: set[int]) -> str:
    if any(id(member.weight) in seen for member in members):
        return "a weight belongs to several linears"
    device = members[0].weight.device.type
    if wanted is None and device not in JOINED_ON:
        return f"it pays little on {device}; patch(..., fusions=True) puts it on"
    return ""


def _mlp_chunks(put: Installation, entry: nn.Module) -> Fusion:
    places, reasons = 0, []
    tried: dict[tuple, str] = {}
    for mlp in row_chunks.mlps_in(entry):
        kind = (
            type(mlp),
            *((type(part), *(w.shape for w in part.parameters(recurse=False))) for part in mlp.modules()),
        )
        why = row_chunks.why_whole(mlp)
        if not why and kind not in tried:
            tried[kind] = row_chunks.differs(mlp)
        if why := why or tried[kind]:
            reasons.append(why)
            continue
        put.override(mlp, "forward", row_chunks.ChunkedRows)
        places += 1
    if not places and not reasons:
        return Fusion(0, "the model has no MLP of its own")
    return Fusion(places, next(iter(reasons), ""))
