"""What fmd_ext knows of transformers' internals, and of torch's calls that change: one name or function per fact, with
the versions it was seen in.

The tests run at both ends of the range `OLDEST` to `NEWEST`; `scripts/canary` runs them with what the package index has
today. transformers and torch are imported only where a fact needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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


# The argument by which `generate` tells a forward how many last positions' logits it reads, and the method of a model
# that says whether its forward takes it. 5.17 to 5.24.
KEPT_LOGITS, SUPPORTS_KEPT_LOGITS = "logits_to_keep", "_supports_logits_to_keep"

# What the name of an attention function contains that is given all windows of an encoder at once, as `cu_seq_lens_q`;
# any other function is called window by window. 5.17 to 5.24: Qwen2.5-Omni, Qwen3-Omni, Qwen2.5-VL.
TAKES_WINDOWS = "flash"


def takes_windows(module: Any) -> bool:
    """Whether an attention module goes by `TAKES_WINDOWS`."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "is_flash_attention_requested" in code.co_names and "cu_seqlens" in code.co_varnames


# --- torch's attention over sequences of several lengths: on CUDA only; seen in 2.10 to 2.15 ---

VARLEN_DTYPES = ("bfloat16", "float16")
VARLEN_CAPABILITY = (8, 0)
LONGEST_VARLEN_HEAD = 256


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention within each sequence, to all of it.

    Args:
        query, key, value: [rows, heads, head_dim], as many heads in all: before 2.12 there is no ``enable_gqa``.
        cu_seqlens: int32 [sequences + 1], where each sequence begins and the last one ends.
        longest: rows of the longest sequence.
        scale: softmax scale; 2.10 has no argument for it and takes head_dim ** -0.5.

    Returns:
        Like ``query``.
    """
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    options = {"scale": scale} if "scale" in inspect.signature(attend).parameters else {}
    return attend(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


@functools.lru_cache(maxsize=64)
def why_no_varlen(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, scale: float) -> str:
    """Why `varlen_attention` does not serve; "" where it does, which a trial on the device has shown."""
    import torch

    if device.type != "cuda":
        return f"torch has no such attention for {device.type}"
    name = str(dtype).removeprefix("torch.")
    if name not in VARLEN_DTYPES:
        return f"it takes {' and '.join(VARLEN_DTYPES)}, not {name}"
    if head_dim % 8 or head_dim > LONGEST_VARLEN_HEAD:
        return f"it takes a head_dim that is a multiple of 8, up to {LONGEST_VARLEN_HEAD}, not {head_dim}"
    if torch.cuda.get_device_capability(device) < VARLEN_CAPABILITY:
        return f"it needs compute capability {_dotted(VARLEN_CAPABILITY)}"
    return _varlen_fails(device, dtype, num_heads, head_dim, scale)


def _varlen_fails(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, scale: float) -> str:
    """Tries `varlen_attention` on two sequences."""
    import torch
    import torch.nn.functional as F

    lengths = (3, 5)
    with torch.inference_mode(False), torch.no_grad():
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        q, k, v = (
            torch.linspace(-1, 2, 3 * sum(lengths) * num_heads * head_dim, device=device)
            .to(dtype)
            .view(3, sum(lengths), num_heads, head_dim)
        )
        try:
            out = varlen_attention(q, k, v, bounds, max(lengths), scale).float()
        except (ImportError, TypeError, ValueError, RuntimeError) as failure:
            return f"a trial failed: {' '.join(str(failure).split())[:200]}"
        parts = zip(*(x.float().transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        own = [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts]
        exact = torch.cat(own, 1).transpose(0, 1)
    error = float((out - exact).abs().max())
    if not error <= 4 * torch.finfo(dtype).eps * float(exact.abs().max()):
        return f"on a trial it differs by {error:.1e}"
    return ""
