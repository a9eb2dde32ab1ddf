"""Rotary position embedding taken over by the append, so that one op rotates q and k and caches k and v.

An attention module rotates q and k by a function of its source file, then hands k and v to the cache. The adapter names
that function where nothing happens to q and k in between. On a patched instance the module's own code runs with that
one name bound to `FusedRotation.defer`: the rotation waits in the running `Call` until the cache appends.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.compat import cache_argument, name_cache
from fmd_ext.engine.call import Rotation
from fmd_ext.engine.compiling import python_only
from fmd_ext.engine.session import Session


class FusedRotation:
    """Replacement of an attention module's ``forward``: its own code, with rotation left to the append."""

    def __init__(self, session: Session, original: Any, name: str) -> None:
        self.session = session
        self.original = original
        self.name = name
        self._forward: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_forward": None}  # a copy defers to its own session

    @python_only  # Dynamo would look for what belongs to a code object in the globals of another function of that code
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._forward is None:
            own = _own_forward(module)
            self._rotate = own.__globals__[self.name]
            names = own.__globals__ | {self.name: self.defer}
            self._forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
            functools.update_wrapper(self._forward, own)
            self._forward.__kwdefaults__ = own.__kwdefaults__
            self._cache_name = cache_argument(inspect.signature(own))
        return self._forward(module, *args, **name_cache(kwargs, self._cache_name))

    def defer(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Leaves the rotation of ``q`` and ``k`` [1, heads, rows, head_dim] to the append of this layer.

        Returns memory for the rotated q, which the append fills, and k as it is, which the append rotates.
        """
        call = self.session.call
        if call is None or args or kwargs or not _is_served(q, k, cos, sin):
            return self._rotate(q, k, cos, sin, *args, **kwargs)
        rows = q[0].transpose(0, 1)
        q_out = torch.empty_like(rows)
        query = q_out.transpose(0, 1)[None]
        angles = [call.once(name, own, _only_sample) for name, own in (("cos", cos), ("sin", sin))]
        call.rotation = Rotation(query, rows, q_out, k, *angles)
        return query, k


def _only_sample(x: Tensor) -> Tensor:
    return x[0]


def _is_served(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the op has these shapes and dtypes: whole heads, rotated by angles of their dtype or float32."""
    return (
        cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
        and cos.dtype == sin.dtype
        and cos.dtype in (q.dtype, torch.float32)
        and q.dtype == k.dtype
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    )


def _own_forward(module: nn.Module) -> Any:
    """The forward of the module's class without its decorators, such as the one that renames the cache argument."""
    return inspect.unwrap(type(module).forward)


def why_not_fused(module: nn.Module, name: str) -> str:
    """Why the append cannot take over what the function ``name`` does for an attention module; "" where it can."""
    own = _own_forward(module)
    if not name:
        return "the adapter does not name a function that rotates"
    if "forward" in module.__dict__:
        return f"something else has replaced the forward of this {type(module).__name__}"
    if not isinstance(own, types.FunctionType) or name not in own.__code__.co_names:
        return f"{type(module).__name__}.forward does not call {name}"
    if not _is_half_rotation(own.__globals__[name]):
        return f"{name} of {type(module).__name__} rotates in another way"
    return ""


def _is_half_rotation(rotate: Any) -> bool:
    """Tries ``rotate`` on small numbers: whether it is what `ops.rope_append_` computes."""
    q, k = torch.linspace(-3, 4, 96, device="cpu").view(2, 1, 2, 3, 8)
    cos, sin = torch.linspace(-1, 1, 48, device="cpu").view(2, 1, 3, 8)

    def rotated(x: Tensor) -> Tensor:
        return x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]

    try:
        got = rotate(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # takes something else
        return False
    return all(torch.allclose(a, rotated(b), atol=1e-6) for a, b in zip(got, (q, k), strict=True))
