"""Visual contrastive decoding (VCD): Leng et al., arXiv 2311.16922; public code DAMO-NLP-SG/VCD.

    logits = (1 + contrast) * l - contrast * l'        l' : the same prompt with its video diffused to noise

and tokens that the plain model finds implausible are excluded. What differs from the public code: it knows images
only, here video frames are noised as well and, if asked, sound features; the noise is drawn per clip from a seed, so
that a batch equals its samples one by one; greedy decoding is possible, not only sampling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.adapters import find_adapter
from fmd_ext.lab.baselines.decoding import Method, Sequence, applied, check_modalities, check_range, plausible
from fmd_ext.lab.baselines.prompts import GRIDS

NUM_NOISE_STEPS = 1000


@contextlib.contextmanager
def vcd(
    model: nn.Module,
    *,
    contrast: float = 1.0,
    beta: float = 0.1,
    noise_step: int = 500,
    modalities: Iterable[str] = ("visual",),
    seed: int = 0,
) -> Iterator[Method]:
    """Within this context ``model.generate`` decodes by VCD. The defaults are those of the public evaluation scripts.

    Args:
        model: a supported model, not patched.
        contrast: the paper's alpha, 0 or more; 0 leaves only the plausibility constraint.
        beta: plausibility in [0, 1]: tokens below ``beta`` times the largest probability are excluded; 0: none.
        noise_step: 0 to 999, how far the features are diffused.
        modalities: which features are noised: of ``"visual"`` and ``"audio"``.
        seed: of the noise.

    Raises:
        ValueError: a value out of range, or a patched model.
        TypeError: a model that is not supported.
    """
    check_range("contrast", contrast, 0)
    check_range("beta", beta, 0, 1)
    check_range("noise_step", noise_step, 0, NUM_NOISE_STEPS - 1)
    chosen = check_modalities(modalities)
    names = [name for source in find_adapter(model).sources if source.modality in chosen for name in source.inputs]
    if not names:
        raise TypeError(f"{type(model).__name__} has no features that are {' or '.join(chosen)} alone")
    with applied(model, _VCD(contrast, beta, noise_step, names, seed)) as method:
        yield method


class _VCD(Method):
    def __init__(self, contrast: float, beta: float, noise_step: int, names: list[str], seed: int) -> None:
        super().__init__()
        self.contrast, self.beta, self.noise_step, self.names, self.seed = contrast, beta, noise_step, names, seed

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        if call.get("mm_encoder_outputs"):
            raise ValueError("VCD adds noise to pixels: give pixel values, not mm_encoder_outputs")
        if any(isinstance(call.get(name), Tensor) for name in self.names):
            sequence.add_runs("noised")

    def arguments(self, name: str, call: dict[str, Any]) -> dict[str, Any]:
        noised = dict(call)
        for feature in self.names:
            if isinstance(call.get(feature), Tensor):
                noised[feature] = diffused(call[feature], self.noise_step, self.seed, call.get(GRIDS.get(feature, "")))
        return noised

    def logits(self, sequence: Sequence, plain: Tensor, second: Callable[[str], Tensor]) -> Tensor:
        if not sequence.runs:
            return plain
        contrasted = (1 + self.contrast) * plain - self.contrast * second("noised")
        return plausible(contrasted, plain, self.beta)


def diffused(features: Tensor, noise_step: int, seed: int, grid: Tensor | None = None) -> Tensor:
    """Features after ``noise_step + 1`` steps of a diffusion whose variances rise along a sigmoid, as in VCD's code.

    Args:
        features: [clips, ...], or [patches of all clips, ...] with ``grid`` [clips, 3], whose products count them.
    """
    betas = torch.linspace(-6, 6, NUM_NOISE_STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(0)[noise_step].item()
    sizes = [1] * len(features) if grid is None else grid.prod(-1).tolist()
    noise = []
    for size in sizes:
        draw = torch.Generator().manual_seed(seed)  # anew for each clip: it does not depend on its neighbours
        noise.append(torch.randn((size, *features.shape[1:]), generator=draw))
    drawn = torch.cat(noise).to(features.device)
    return (kept**0.5 * features.float() + (1 - kept) ** 0.5 * drawn).to(features.dtype)
