"""Each op once, on a small input, against plain PyTorch on the CPU in float64."""

from __future__ import annotations

import torch

from fmd_ext.ops import dispatch, registration

HEADS, KV_HEADS, SLOTS = 4, 2, 300
# Largest difference from plain PyTorch, relative to the largest value: some hundred roundings in float32, a few of the
# results and of the softmax's weights in low precision.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}


class Inputs:
    """Random tensors of a dtype on a device, and int64 ones; the same values every time.

    Args:
        device, dtype: of the floating-point tensors.
        head_dim: of keys and values.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        self.device = device
        self.dtype = dtype
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)

    def index(self, values: list | range) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)


def errors(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> dict[str, float | str]:
    """By op: the largest difference from plain PyTorch relative to the largest value, or the message of its error."""
    found: dict[str, float | str] = {}
    for name, op in registration.operators().items():
        try:
            assert op.self_test is not None, f"fmd_ext.ops has no self-test of {name}"
            with torch.no_grad():
                found[name] = max(_difference(*pair) for pair in op.self_test(Inputs(device, dtype, head_dim)))
        except Exception as error:  # whatever is broken, the report goes on
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


def dtypes_of(op: str, device_type: str) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels of `op` take on a type of device."""
    narrow = device_type == "cuda" and registration.operators()[op].attention
    return dispatch.CUDA_ATTENTION_DTYPES if narrow else dispatch.KERNEL_DTYPES


def problems(device: torch.device) -> list[str]:
    """What the kernels of a CUDA device get wrong, over their dtypes and head sizes."""
    said = []
    for dtype in dispatch.CUDA_ATTENTION_DTYPES:
        for head_dim in dispatch.CUDA_ATTENTION_HEAD_DIMS:
            for name, outcome in errors(device, dtype, head_dim).items():
                if problem := problem_of(name, dtype, outcome):
                    said.append(problem)
    return said


def problem_of(op: str, dtype: torch.dtype, outcome: float | str) -> str:
    """What is wrong with an outcome of `errors`; "" where nothing is."""
    name = str(dtype).removeprefix("torch.")
    if isinstance(outcome, str):
        return f"{op} of {name} fails: {outcome}"
    return "" if outcome <= TOLERANCES[dtype] else f"{op} of {name} gives a wrong result, off by {outcome:.1e}"


Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # what an op gave, and what it should have given


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((exact(got) - want).abs().max() / want.abs().max().clamp(min=1.0))


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().double()
