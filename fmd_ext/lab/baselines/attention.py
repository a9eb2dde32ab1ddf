"""What the baselines compute of attention themselves, from what the model's attention functions get."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def visible_keys(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """bool [batch or 1, 1, queries, keys]: which key each query sees, from the mask that attention functions get.

    Raises TypeError for a kind of mask that only one attention implementation understands.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        ones = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
        return ones.tril(diagonal=keys - queries)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TypeError("baselines that change attention need attn_implementation 'sdpa' or 'eager'")
    mask = mask[..., :keys]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """float32 [batch, num_qo_heads, queries, keys] of query [batch, num_qo_heads, queries, head_dim] and key
    [batch, num_kv_heads, keys, head_dim]."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.float() @ key.transpose(-1, -2) * scale


def weighted_values(weights: Tensor, value: Tensor, like: Tensor) -> Tensor:
    """Attention output [batch, queries, num_qo_heads, head_dim] of weights [batch, num_qo_heads, queries, keys]."""
    value = value.float().repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return (weights @ value).transpose(1, 2).to(like.dtype)


def attention_without(
    hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention [batch, queries, num_qo_heads, head_dim] in which ``hidden`` prompt positions [batch, heads or 1,
    prompt length] are no keys; a position always sees itself, so that no row is empty."""
    queries, keys = query.shape[2], key.shape[2]
    seen = visible_keys(mask, query, key).expand(len(hidden), hidden.shape[1], -1, -1).clone()
    seen[..., : hidden.shape[-1]] &= ~hidden[:, :, None]
    own = torch.ones(queries, keys, dtype=torch.bool, device=seen.device).tril(keys - queries).triu(keys - queries)
    out = nn.functional.scaled_dot_product_attention(query, key, value, seen | own, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
