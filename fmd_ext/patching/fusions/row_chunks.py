"""MLPs of long prompts, some thousand rows at a time: what lies between their linears does not grow with the prompt.

With zero masking the fork layers have nearly twice the prompt's rows, and an MLP holds three to four tensors of several
times the hidden size for each: the largest part of a long prefill's peak.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.engine.session import Session
from fmd_ext.patching.fusions.products import ALLOWED, HOOKS

# Rows at a time: enough for a product to run at a device's full rate.
MOST_ROWS = 4096

# The linears of an MLP, by the names that transformers gives them; beside them it holds nothing that has weights.
LINEARS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("linear_fc1", "linear_fc2"),
    ("fc1", "fc2"),
)


class ChunkedRows:
    """Replacement of an MLP's ``forward``: the same for each row, at most `MOST_ROWS` of them at a time."""

    def __init__(self, session: Session, original: Any) -> None:
        self.original = original

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The MLP of the one argument [..., rows, size]."""
        hidden, *more = (*args, *kwargs.values())
        if more or hidden.numel() <= MOST_ROWS * hidden.shape[-1] or torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling() or _has_hooks(module):  # PEFT's adapter by sample counts a call's rows
            return self.original(*args, **kwargs)
        num_rows = math.prod(hidden.shape[:-1])
        return in_chunks(self.original, hidden, math.ceil(num_rows / math.ceil(num_rows / MOST_ROWS)))


def in_chunks(mlp: Any, hidden: Tensor, size: int) -> Tensor:
    """``mlp`` of ``hidden`` [..., rows, size], ``size`` rows at a time."""
    rows = hidden.reshape(*(1,) * (hidden.dim() - 2), -1, hidden.shape[-1])
    out: Tensor | None = None
    start = 0
    for chunk in rows.split(size, -2):
        own = mlp(chunk)
        if out is None:
            out = own.new_empty(*rows.shape[:-1], own.shape[-1])
        out.narrow(-2, start, chunk.shape[-2]).copy_(own)
        start += chunk.shape[-2]
        del own
    return hidden.new_empty(hidden.shape) if out is None else out.view(*hidden.shape[:-1], out.shape[-1])


def mlps_in(part: nn.Module) -> Iterable[nn.Module]:
    """The modules below ``part`` that are an MLP and nothing else."""
    for module in part.modules():
        names, children = _linears_of(module), module._modules
        others = [child for name, child in children.items() if name not in names and child is not None]
        if names and not module._parameters and not any(True for other in others for _ in other.parameters()):
            yield module


def _linears_of(module: nn.Module) -> tuple[str, ...]:
    """Those of `LINEARS` that a module has; quantised and adapted ones say ``in_features`` as well."""
    for names in LINEARS:
        if all(hasattr(module._modules.get(name), "in_features") for name in names):
            return names
    return ()


def _has_hooks(mlp: nn.Module) -> bool:
    """Whether something looks at what is inside an MLP, now; some hooks are there for one call."""
    return any(getattr(part, hooks, None) for part in mlp.modules() for hooks in HOOKS if part is not mlp)


def why_whole(mlp: nn.Module) -> str:
    """Why an MLP gets all rows at once; "" where it need not."""
    kind = type(mlp).__name__
    parameters = list(inspect.signature(type(mlp).forward).parameters.values())[1:]
    if len([p for p in parameters if p.default is p.empty]) != 1:
        return f"{kind} takes more than hidden states"
    if _has_hooks(mlp):
        return "a linear has hooks"
    if "forward" in mlp.__dict__:
        return f"something else has replaced the forward of this {kind}"
    return ""


def differs(mlp: nn.Module) -> str:
    """Tries an MLP on a few rows: why it does not compute the same for one row at a time; "" where it does."""
    kind = type(mlp).__name__
    weight = next((w for w in mlp.parameters() if w.is_floating_point()), None)
    if weight is None or weight.is_meta:
        return f"{kind} has no weights to be tried with"
    size = getattr(mlp, _linears_of(mlp)[0]).in_features
    own = type(mlp).forward
    autocast = torch.autocast(weight.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        rows = torch.linspace(-1, 2, 3 * size, device=weight.device).view(1, 3, size).to(weight.dtype)
        try:
            whole = own(mlp, rows)
            apart = in_chunks(lambda chunk: own(mlp, chunk), rows, 1)
        except (TypeError, ValueError, RuntimeError, AttributeError) as failure:
            return f"a trial of {kind} failed: {failure}"
    error, largest = float((whole - apart).abs().max()), float(whole.abs().max())
    if not error <= ALLOWED * torch.finfo(whole.dtype).eps * largest:
        return f"on a trial {kind} differs by {error:.1e}, of {largest:.1e}"
    return ""
