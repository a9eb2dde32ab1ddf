"""Whether an output is right, in the only sense that counts: as right as plain PyTorch in the same dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


class WrongOutput(Exception):
    """A candidate's output differs from the reference by more than rounding: its speed means nothing."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The right result: ``tensors`` (float32 or float64) and the largest row error that is ``allowed``."""

    tensors: Sequence[Tensor]
    allowed: float

    @classmethod
    def beside(cls, tensors: Sequence[Tensor], plain: Sequence[Tensor]) -> Reference:
        """Allows twice the error of ``plain``, which is plain PyTorch in the dtype under test, one rounding, and four
        of float32, in which sums run: ``plain`` may get a few rows right by luck."""
        eps = max(torch.finfo(tensor.dtype).eps for tensor in plain) + 4 * torch.finfo(torch.float32).eps
        worst = max(row_error(own, exact) for own, exact in zip(plain, tensors, strict=True))
        return cls(tensors, 2 * worst + eps)

    def check(self, name: str, output: Sequence[Tensor]) -> float:
        """The error of ``output``. Raises WrongOutput when it is above what is allowed, or the shapes differ."""
        shapes = [list(tensor.shape) for tensor in output], [list(tensor.shape) for tensor in self.tensors]
        if shapes[0] != shapes[1]:
            raise WrongOutput(f"{name}: output shapes {shapes[0]}, the reference has {shapes[1]}")
        error = max(row_error(own, exact) for own, exact in zip(output, self.tensors, strict=True))
        if not error <= self.allowed:
            raise WrongOutput(
                f"{name}: wrong output, relative error {error:.2e}, at most {self.allowed:.2e} is rounding"
            )
        return error


def row_error(output: Tensor, exact: Tensor) -> float:
    """The largest error of a row (last dimension), relative to that row's largest exact value; inf where not finite.

    Per row, because the rows of an attention's output differ in size by orders of magnitude.
    """
    if output.numel() == 0:
        return 0.0
    difference = (output.to(exact) - exact).abs().amax(-1)
    scale = exact.abs().amax(-1)
    error = torch.where(difference == 0, 0.0, difference / scale)  # a row of zeros must be zeros
    return float(torch.where(output.isfinite().all(-1), error, torch.inf).max())
