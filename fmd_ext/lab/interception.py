"""Runs code of ours in the place of a decoder's attention function, and takes it out again.

Only what goes into the attention function is seen or changed, so any attention implementation of transformers will do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from fmd_ext.compat import attention_function
from fmd_ext.patching.branched_config import branched_config

INTERCEPTED_NAME = "fmd_ext_intercepted"
_INTERCEPTOR = "_fmd_interceptor"

# (attention function of the module, module, query, key, value, mask, softmax scale, other arguments) -> its result
Interceptor = Callable[..., tuple[torch.Tensor, Any]]


@contextlib.contextmanager
def intercepting(decoder: nn.Module, attribute: str, interceptor: Interceptor) -> Iterator[None]:
    """Within this context the attention modules of ``decoder`` call ``interceptor``; afterwards they are as before.

    ``interceptor(attend, module, query, key, value, mask, scale, **kwargs)`` gets the module's own attention function
    as ``attend(module, query, key, value, mask, scaling=scale, **kwargs)``. Contexts may be nested; the inner one's
    ``attend`` is the outer one's interceptor.

    Args:
        attribute: of a decoder layer, under which its attention module is found.
    """
    modules = [getattr(layer, attribute) for layer in decoder.layers]
    before = [(module.config, module.__dict__.get(_INTERCEPTOR)) for module in modules]
    try:
        for module in modules:
            attend = functools.partial(interceptor, _attention_function(module))
            module.config = branched_config(module.config, INTERCEPTED_NAME)
            module.__dict__[_INTERCEPTOR] = attend
        yield
    finally:
        for module, (config, outer) in zip(modules, before, strict=True):
            module.config = config
            if outer is None:
                module.__dict__.pop(_INTERCEPTOR, None)
            else:
                module.__dict__[_INTERCEPTOR] = outer


def _intercepted(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.__dict__[_INTERCEPTOR](module, query, key, value, attention_mask, scale, **kwargs)


AttentionInterface.register(INTERCEPTED_NAME, _intercepted)


def _attention_function(module: nn.Module) -> Callable[..., Any]:
    """The function that the module would call."""
    outer = module.__dict__.get(_INTERCEPTOR)
    if outer is not None:
        return lambda module, query, key, value, mask, scaling, **kwargs: outer(
            module, query, key, value, mask, scaling, **kwargs
        )
    return attention_function(module)
