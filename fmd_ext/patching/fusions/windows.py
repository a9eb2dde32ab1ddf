"""The attention of encoders whose rows fall into windows: one call for all windows, where transformers makes one each.

On CUDA that call is torch's attention over sequences of any lengths. Elsewhere, and where that one does not take the
dtype or the heads, there is one call per length of window: windows of equal length are a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fmd_ext import compat
from fmd_ext.engine.compiling import python_only
from fmd_ext.patching.branched_config import branched_config
from fmd_ext.patching.installation import Installation

ATTENTION_NAME = f"fmd_ext_{compat.TAKES_WINDOWS}_windows"
REPLACED = "sdpa"  # the attention of an encoder that this one stands for

# Windows of a trial: two of equal length with others in between.
TRIED = (3, 5, 3, 1)
# Where a trial's result is further from the encoder's own than rounding explains: times the dtype's epsilon and the
# largest value.
ALLOWED = 16


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where the windows of a call lie.

    Args:
        groups: number and length of the windows of each group; all of a group have the same length.
        order: int64 [rows], the rows group by group; None where they lie so already.
        back: int64 [rows], the place of each row in ``order``.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    back: Tensor | None = None


@functools.lru_cache(maxsize=16)
def windows_of(bounds: tuple[int, ...], device: torch.device) -> Windows:
    """The windows between ``bounds``: where each begins, and where the last one ends."""
    starts: dict[int, list[int]] = {}
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            starts.setdefault(end - start, []).append(start)
    groups = tuple((len(own), length) for length, own in starts.items())
    with torch.inference_mode(False):
        rows = [torch.tensor(own)[:, None] + torch.arange(length) for length, own in starts.items()]
        order = torch.cat([own.flatten() for own in rows]) if rows else torch.arange(0)
        if len(rows) < 2 or torch.equal(order, torch.arange(bounds[0], bounds[-1])):
            return Windows(groups)
        return Windows(groups, order.to(device), order.argsort().to(device))


@python_only
def attention_to_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: rows see the rows of their own window.

    Args:
        query, key, value: [1, heads, rows, head_dim].
        scaling: softmax scale, default head_dim ** -0.5.
        cu_seq_lens_q, cu_seq_lens_k: the same int32 [windows + 1], where each window begins and the last one ends.
        max_length_q: rows of the longest window.

    Returns:
        [1, rows, heads, head_dim], and None for the weights.

    Raises:
        TypeError: a mask, causal attention, no windows, or others for the keys.
    """
    if attention_mask is not None or is_causal or cu_seq_lens_q is None or cu_seq_lens_k is not cu_seq_lens_q:
        raise TypeError(
            f"{type(module).__name__} asks for more than attention within windows, which is all that fmd_ext runs in "
            "an encoder: patch(..., fusions=False) leaves its own attention"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if not dropout and max_length_q is not None and not compat.why_no_varlen(q.device, q.dtype, *q.shape[1:], scale):
        return compat.varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale)[None], None
    return _by_length(q, k, v, windows_of(tuple(cu_seq_lens_q.tolist()), q.device), scale, dropout)[None], None


AttentionInterface.register(ATTENTION_NAME, attention_to_windows)


def _by_length(q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float, dropout: float) -> Tensor:
    """q, k, v and the result [rows, heads, head_dim]."""
    if windows.order is not None:
        q, k, v = (x.index_select(0, windows.order) for x in (q, k, v))
    outs, start = [], 0
    for number, length in windows.groups:
        queries, keys, values = (
            x.narrow(0, start, number * length).unflatten(0, (number, length)).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        start += number * length
    if not outs:
        return torch.empty_like(q)
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if windows.back is None else out.index_select(0, windows.back)


# --- putting on -----------------------------------------------------------------------------------------------------


def put_on(put: Installation, entry: nn.Module, decoder: nn.Module) -> tuple[int, list[str]]:
    """Puts it on the encoders of ``entry``: all modules but those of ``decoder``.

    Returns:
        How many attention modules run by it, and why others do not.
    """
    places, reasons = 0, []
    for holders, attention in _towers(entry, decoder):
        why = _why_not(attention[0]) or _differs(attention[0])
        if why:
            reasons.append(why)
            continue
        for module in holders:
            put.set(module, "config", branched_config(module.config, ATTENTION_NAME))
        places += len(attention)
    return places, reasons


def outside(entry: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules of ``entry`` that are not the decoder's."""
    inside = set(map(id, decoder.modules()))
    return [module for module in entry.modules() if id(module) not in inside]


def _towers(entry: nn.Module, decoder: nn.Module) -> list[tuple[list[nn.Module], list[nn.Module]]]:
    """Encoders with windows: the modules that ask a config which attention runs, and the attention modules of them."""
    found: dict[int, tuple[list[nn.Module], list[nn.Module]]] = {}
    modules = [module for module in outside(entry, decoder) if "config" in module.__dict__]
    for module in modules:
        if compat.takes_windows(module):
            found.setdefault(id(module.config), ([], []))[1].append(module)
    for module in modules:
        holders, attention = found.get(id(module.config), ([], []))
        parts = set(map(id, module.modules()))
        if any(id(own) in parts for own in attention):
            holders.append(module)
    return list(found.values())


def _why_not(attention: nn.Module) -> str:
    """Why the attention of an encoder is left as it is; "" where it is not."""
    name, kind = str(attention.config._attn_implementation), type(attention).__name__
    if compat.TAKES_WINDOWS in name:
        return f"{name} of {kind} takes all windows at once"
    if name != REPLACED:
        return f"{kind} was asked to run on {name!r}"
    if any(weight.is_meta for weight in attention.parameters()):
        return "a weight is not in memory"
    return ""


def _differs(attention: nn.Module) -> str:
    """Tries an attention module on a few rows: why it does not compute the same with ours; "" where it does."""
    kind, own = type(attention).__name__, attention.config
    weight = next((w for w in attention.parameters() if w.is_floating_point()), None)
    if weight is None:
        return f"{kind} has no weights to be tried with"
    results = []
    autocast = torch.autocast(weight.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        try:
            given = _trial(attention, weight)
            for config in (own, branched_config(own, ATTENTION_NAME)):
                attention.__dict__["config"] = config
                results.append(type(attention).forward(attention, **given))
        except (TypeError, ValueError, RuntimeError, AttributeError) as failure:
            return f"a trial of {kind} failed: {failure}"
        finally:
            attention.__dict__["config"] = own
    error, largest = float((results[0] - results[1]).abs().max()), float(results[0].abs().max())
    if not error <= ALLOWED * torch.finfo(results[0].dtype).eps * largest:
        return f"on a trial {kind} differs by {error:.1e}, of {largest:.1e}"
    return ""


def _trial(attention: nn.Module, weight: Tensor) -> dict[str, Any]:
    """The arguments of an attention module for windows of `TRIED` lengths."""
    rows, head_dim = sum(TRIED), attention.head_dim
    size = attention.num_heads * head_dim
    given: dict[str, Any] = {
        "hidden_states": torch.linspace(-1, 2, rows * size, device=weight.device).view(rows, size).to(weight.dtype),
        "cu_seqlens": torch.tensor([0, *TRIED], device=weight.device).cumsum(0).int(),
    }
    if "position_embeddings" in inspect.signature(type(attention).forward).parameters:
        angles = torch.linspace(-1, 1, rows * head_dim, device=weight.device).view(rows, head_dim)
        given["position_embeddings"] = (angles.cos(), angles.sin())
    return given
