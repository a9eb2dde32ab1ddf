"""Plain causal attention by torch: cuDNN's or flash on CUDA, what torch chooses elsewhere."""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # of CUDA, the faster one first
LARGEST_HEAD_DIM = 128  # that both take
TRIED_ROWS = 192
# Largest difference on a trial with inputs of about 1: times the dtype's epsilon.
ALLOWED = 8


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of each row to itself and the rows before it.

    Args:
        q: [batch, num_qo_heads, rows, head_dim].
        k, v: [batch, num_kv_heads, rows, head_dim].
        scale: softmax scale.

    Returns:
        Like ``q``.
    """
    heads_per_kv, has_backends = q.shape[1] // k.shape[1], _has_backends(q)
    if heads_per_kv > 1 and not has_backends:  # other ways to share heads hold a number per head, query and key
        k, v = (heads.repeat_interleave(heads_per_kv, dim=1) for heads in (k, v))
    with sdpa_kernel(BACKENDS, set_priority=True) if has_backends else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=has_backends and heads_per_kv > 1
        )


def _has_backends(q: Tensor) -> bool:
    """Whether `BACKENDS` take such queries, and fewer key heads than query heads."""
    if q.device.type != "cuda" or torch.version.hip or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.shape[3] <= LARGEST_HEAD_DIM and torch.cuda.get_device_capability(q.device) >= (8, 0)


@functools.cache
def problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Tries `causal_attention` on a small input. Returns what is wrong; "" where all is right."""
    with torch.inference_mode(False), torch.no_grad():
        numbers = torch.linspace(-3, 3, 4 * TRIED_ROWS * head_dim, device=device).sin().to(dtype)
        heads = numbers.view(1, TRIED_ROWS, 4, head_dim).transpose(1, 2)
        q, k, v = heads[:, :2], heads[:, 2:3], heads[:, 3:]
        try:
            out = causal_attention(q, k, v, head_dim**-0.5).float()
        except RuntimeError as failure:
            return f"torch's causal attention failed: {' '.join(str(failure).split())[:200]}"
        scores = (q.float() @ k.float().transpose(2, 3)) * head_dim**-0.5
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        exact = scores.masked_fill(later, -torch.inf).softmax(-1) @ v.float()
        error = float((out - exact).abs().max())
    if not error <= ALLOWED * torch.finfo(dtype).eps:
        return f"torch's causal attention differs by {error:.1e} from its definition"
    return ""
