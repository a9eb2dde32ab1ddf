"""What a decoder returns for packed rows, as the caller expects it: by sample and position."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput

from fmd_ext.compat import cache_kwargs, cache_name
from fmd_ext.engine.plan import Plan


def unpack_outputs(out: ModelOutput, plan: Plan, cache: Any) -> ModelOutput:
    """Outputs [1, rows, ...] as [batch, length, ...], flat ones [rows, ...] as [batch * length, ...], and ``cache``.

    Outputs of layers before the merge are those of the home rows. Padding is zero. Raises TypeError for an output that
    has no rows.
    """
    values = {
        name: _unpacked(name, value, plan) for name, value in out.items() if name != cache_name() and value is not None
    }
    if cache is None or getattr(out, cache_name(), None) is not cache:
        return type(out)(**values, **cache_kwargs(cache))
    # The same object: to make another costs more than all else that this module does in a decode step.
    for name, value in values.items():
        out[name] = value
    return out


def _unpacked(name: str, value: Any, plan: Plan) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_unpacked(name, item, plan) for item in value)
    counts = (plan.num_rows, plan.num_home)
    if isinstance(value, torch.Tensor):
        if value.dim() >= 3 and value.shape[0] == 1 and value.shape[1] in counts:
            return unpack_rows(value, plan)
        if value.dim() >= 2 and value.shape[0] in counts:  # such as the router's logits of a mixture of experts
            return unpack_rows(value[None], plan).flatten(0, 1)
    shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    raise TypeError(
        f"the decoder returns {name} ({shape}), which is not given by row, so that fmd_ext cannot hand it back by "
        "position: switch it off, or unpatch the model"
    )


def unpack_rows(rows: torch.Tensor | None, plan: Plan) -> torch.Tensor | None:
    """Home rows of [1, rows, ...] as [batch, length, ...]; padding is zero."""
    if rows is None:
        return None
    if plan.is_dense:
        home = rows if rows.shape[1] == plan.num_home else rows.narrow(1, 0, plan.num_home)
        return home if plan.batch == 1 else home.reshape(plan.batch, plan.length, *rows.shape[2:])
    home = rows[0, : plan.num_home]
    padded = home.new_zeros((plan.batch * plan.length, *home.shape[1:]))
    padded[plan.tensors.get("positions", home.device)[: plan.num_home]] = home
    return padded.unflatten(0, (plan.batch, plan.length))
