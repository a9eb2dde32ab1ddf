"""Linears that read the same rows as one product: q, k and v of an attention module, gate and up of an MLP.

The parent's own code runs and calls its linears as ever. The first one called multiplies the rows by all weights of its
group; the others are handed their columns, as long as they are given the same tensor. The weights are the same
parameters as before; their memory is one buffer, of which each is a range of rows, so that no second copy exists.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmd_ext.engine.session import Session

logger = logging.getLogger(__name__)

# By the name of the fusion: linears that a parent calls on the same rows.
GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}

# Where a group's product is larger than rounding explains: times the dtype's epsilon and the largest value.
ALLOWED = 16

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Held(NamedTuple):
    """A product: the rows that it was made of, their version, and the columns not handed out yet, by member."""

    rows: weakref.ref
    version: int
    columns: dict[int, Tensor]


class JoinedLinears:
    """A group of linears, `join`ed.

    Args:
        members: the linears, in the order of their rows in the buffer.
        said: reasons that have been told why linears run one by one although they were joined; one set per patch.
    """

    def __init__(self, members: tuple[nn.Linear, ...], said: set[str]) -> None:
        self.members = members
        self.said = said
        self._forget()

    def _forget(self) -> None:
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._pointers: list[int] = []
        self._held: _Held | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model's parameters have memory of their own: the first call joins them."""
        copied = JoinedLinears.__new__(JoinedLinears)
        copied.members, copied.said = self.members, self.said
        copied._forget()
        return copied.__dict__

    # --- memory -----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Moves the parameters into one buffer, unless they lie in one already (as with another patch's)."""
        with torch.inference_mode(False), torch.no_grad():
            self._weight = _joined([member.weight for member in self.members])
            if self.members[0].bias is not None:
                self._bias = _joined([member.bias for member in self.members])
        self._pointers = self._addresses()

    def split(self) -> None:
        """Gives every parameter memory of its own again. What shares memory with others is kept whole by whoever saves
        or frees one of them, so that it would be a trace."""
        self._forget()
        with torch.inference_mode(False), torch.no_grad():
            for parameter in self._parameters():
                if type(parameter) is nn.Parameter and _shares_memory(parameter):
                    parameter.data = parameter.data.clone()

    def _parameters(self) -> Iterable[nn.Parameter]:
        for name in ("weight", "bias"):
            found = [member._parameters[name] for member in self.members]
            yield from (parameter for parameter in found if parameter is not None)

    def _addresses(self) -> list[int]:
        names = ("weight",) if self._bias is None else ("weight", "bias")
        try:
            return [member._parameters[name].data_ptr() for name in names for member in self.members]
        except RuntimeError:  # a wrapper around other tensors, such as a quantised weight
            return []

    def _is_joined(self) -> bool:
        """Whether the parameters lie where they were joined. Where they have moved, they are joined there."""
        if self._weight is not None and self._addresses() == self._pointers:
            return True
        self._forget()
        why = why_apart(self.members)
        if not why:
            self.join()
        elif why not in self.said:
            self.said.add(why)
            logger.warning("fmd_ext: linears that ran as one product run one by one: %s", why)
        return not why

    # --- the product ------------------------------------------------------------------------------------------------

    def __call__(self, index: int, rows: Tensor) -> Tensor | None:
        """Member ``index`` of ``rows`` [..., in_features]; None where it has to run by itself."""
        held = self._held
        if held is not None and held.rows() is rows and held.version == _version(rows):
            known = held.columns.pop(index, None)  # each is handed out once, since the parent may write into it
            if known is not None:
                return known
        if torch.is_grad_enabled() or type(rows) is not Tensor or torch.is_autocast_enabled(rows.device.type):
            return None
        if not self._is_joined() or rows.dtype != self._weight.dtype or rows.device != self._weight.device:
            return None
        product = F.linear(rows, self._weight, self._bias)
        columns: dict[int, Tensor] = {}
        start = 0
        for place, member in enumerate(self.members):
            columns[place] = product.narrow(-1, start, member.out_features)
            start += member.out_features
        own = columns.pop(index)
        self._held = _Held(weakref.ref(rows, self._let_go), _version(rows), columns)
        return own

    def _let_go(self, rows: weakref.ref) -> None:
        """Nobody can ask for the columns of these rows any more."""
        held = self._held
        if held is not None and held.rows is rows:
            self._held = None

    def differs(self) -> str:
        """Tries the product on a few rows: how far it is from the linears' own code, where that is more than rounding;
        "" elsewhere."""
        weight = self.members[0].weight
        rows = torch.linspace(-1, 2, 3 * weight.shape[1], device=weight.device).view(3, -1).to(weight.dtype)
        autocast = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            for index, member in enumerate(self.members):
                own, joined = type(member).forward(member, rows), self(index, rows)
                if joined is None:
                    return "it did not run"
                error, largest = float((own - joined).abs().max()), float(own.abs().max())
                if not error <= ALLOWED * torch.finfo(own.dtype).eps * largest:
                    return f"on a trial it differs by {error:.1e}, of {largest:.1e}"
        return ""


class JoinedLinear:
    """Replacement of the ``forward`` of a linear in a group."""

    def __init__(self, session: Session, original: Any, group: JoinedLinears, index: int) -> None:
        self.original = original
        self.group = group
        self.index = index

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or torch.compiler.is_compiling():  # a compiler joins what it finds worth joining
            return self.original(*args, **kwargs)
        out = self.group(self.index, args[0])
        return self.original(*args) if out is None else out


def groups_in(layer: nn.Module, names: tuple[str, ...]) -> Iterable[nn.Module]:
    """The modules below ``layer`` that hold linears of all ``names``."""
    for module in layer.modules():
        if all(isinstance(module._modules.get(name), nn.Module) for name in names):
            yield module


def why_not_joined(parent: nn.Module, names: tuple[str, ...]) -> str:
    """Why the linears ``names`` of ``parent`` cannot run as one product; "" where they can."""
    members = tuple(parent._modules[name] for name in names)
    for name, member in zip(names, members, strict=True):
        if "forward" in member.__dict__ or "_hf_hook" in member.__dict__:
            return f"something else has replaced the forward of {name}"
    code = getattr(inspect.unwrap(type(parent).forward), "__code__", None)
    if code is None or not set(names) <= set(code.co_names):
        return f"{type(parent).__name__}.forward does not call {', '.join(names)}"
    return why_apart(members)


def why_apart(members: tuple[nn.Module, ...]) -> str:
    """Why linears are not joined, for what they are; "" where they can be."""
    for member in members:
        if type(member) is not nn.Linear:
            return f"a {type(member).__module__}.{type(member).__name__} is no plain torch.nn.Linear"
        if any(getattr(member, hooks, None) for hooks in HOOKS):
            return "a linear has hooks"
    if len({member.bias is None for member in members}) > 1:
        return "some linears have a bias and some have none"
    for name in ("weight", "bias"):
        parameters = [member._parameters[name] for member in members if member._parameters[name] is not None]
        if parameters and (why := _why_apart(parameters)):
            return why
    return ""


def _why_apart(parameters: list[nn.Parameter]) -> str:
    if any(type(parameter) is not nn.Parameter for parameter in parameters):
        return "a weight is of a kind of its own, such as a part of a distributed one"
    if len(set(map(id, parameters))) < len(parameters):
        return "a weight belongs to several linears"
    if any(parameter.is_meta for parameter in parameters):
        return "a weight is not in memory"
    kinds = {(p.dtype, p.device, p.shape[1:]) for p in parameters}
    if len(kinds) > 1 or not all(p.is_floating_point() and p.is_contiguous() for p in parameters):
        return "the weights differ in dtype, device or layout"
    if any(parameter.is_inference() for parameter in parameters):
        return "a weight was made in inference mode"
    if _whole(parameters) is None and any(map(_shares_memory, parameters)):
        return "a weight shares its memory with others"
    return ""


def _shares_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of all rows, which are the parameters' own memory from then on."""
    whole = _whole(parameters)
    if whole is None:
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return whole


def _whole(parameters: list[nn.Parameter]) -> Tensor | None:
    """The tensor of all rows where they follow one another in one buffer that holds nothing else; else None."""
    first = parameters[0].detach()
    place = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != place:
            return None
        place += parameter.nbytes
    if first.untyped_storage().nbytes() != place - first.data_ptr():
        return None
    return first.as_strided((sum(len(p) for p in parameters), *first.shape[1:]), first.stride())


def _version(tensor: Tensor) -> int:
    """How often it was written into; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
