"""What fmd_ext knows of transformers' internals: one name or function per fact, with the versions it was seen in.

The tests run at both ends of the range `OLDEST` to `NEWEST`; `scripts/canary` runs them with what the package index has
today. transformers is imported only where a fact needs it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# The transformers versions that the tests ran on: pyproject.toml and constraints.txt say the same, which a test holds.
OLDEST, NEWEST = (5, 17), (5, 24)

OLD_CACHE_NAME, NEW_CACHE_NAME = "past_key_values", "cache"


def check_transformers() -> str:
    """Says in one line where the installed transformers is outside the range; "" where it is inside.

    Raises:
        ImportError: transformers is not installed, or older than `OLDEST`.
    """
    accepted = f"fmd_ext supports transformers {_dotted(OLDEST)} to {_dotted(NEWEST)}"
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{accepted}; none is installed") from None
    version = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if version < OLDEST:
        raise ImportError(f"{accepted}; {installed} is installed: upgrade it")
    if version > NEWEST:
        return f"{accepted}; {installed} is installed, which its tests did not run on"
    return ""


@functools.cache
def warn_about_transformers() -> None:
    """`check_transformers`, with what it says in a warning, once."""
    if said := check_transformers():
        logger.warning("fmd_ext: %s", said)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# --- the key-value cache ---


@functools.cache
def cache_name() -> str:
    """The name of the cache in arguments and outputs: ``cache`` from 5.24 on, before ``past_key_values``."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return NEW_CACHE_NAME if NEW_CACHE_NAME in fields else OLD_CACHE_NAME


def cache_argument(signature: inspect.Signature) -> str:
    """The name that a function takes the cache by; `cache_name` where it stands in ``**kwargs``."""
    for name in (NEW_CACHE_NAME, OLD_CACHE_NAME):
        if name in signature.parameters:
            return name
    return cache_name()


def name_cache(call: dict[str, Any], name: str) -> dict[str, Any]:
    """``call`` with its cache under ``name``, whichever of both names it was given by.

    In versions that know one name only, the other one is no cache and stays as it is.

    Raises:
        ValueError: two caches under two names.
    """
    if cache_name() == OLD_CACHE_NAME and name == OLD_CACHE_NAME:
        return call
    other = OLD_CACHE_NAME if name == NEW_CACHE_NAME else NEW_CACHE_NAME
    if other not in call:
        return call
    call = dict(call)
    cache = call.pop(other)
    if cache is not None and call.get(name) is not None and call[name] is not cache:
        raise ValueError(f"two caches are given, as {OLD_CACHE_NAME} and as {NEW_CACHE_NAME}; give one")
    if call.get(name) is None:
        call[name] = cache
    return call


def cache_kwargs(cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of a transformers model, or as a field of its output."""
    return {cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None without one."""
    return getattr(output, cache_name(), None)


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a ``forward`` that names its cache argument ``cache``: callers may use either name.

    transformers reads a model's arguments off its signature, so the signature shows the name of the installed version.
    """
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if OLD_CACHE_NAME in kwargs:
            kwargs = name_cache(kwargs, NEW_CACHE_NAME)
        return forward(*args, **kwargs)

    renamed.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what `inspect` reads of any function
        parameters=[
            p.replace(name=cache_name()) if p.name == NEW_CACHE_NAME else p for p in signature.parameters.values()
        ]
    )
    return renamed


# --- attention ---


def attention_function(module: Any) -> Callable[..., Any]:
    """The attention function that an attention module would call: the eager one stands in its source file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
