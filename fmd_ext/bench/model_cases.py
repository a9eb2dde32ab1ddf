"""Prefill and decode step of a whole model: vanilla on SDPA, both maskings patched, and the paper's two passes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.adapters import AUDIO, VISUAL, find_adapter
from fmd_ext.config import AUTO, MASKINGS, MODALITIES
from fmd_ext.reference import reference_hidden

from .cases import Candidate, Case
from .checking import Reference
from .models import TwoPasses, build_thinker, sharing_weights, text_labels
from .timing import Step
from .workload import Workload

# float32 against the reference in float32: what the project promises for logits, which are of order 1.
FLOAT32_ERROR = 1e-4

Caches = tuple[DynamicCache, ...]


@dataclasses.dataclass(frozen=True)
class Runner:
    """One way to run the model: ``call`` takes embeddings and labels behind the caches and returns logits."""

    name: str
    num_caches: int
    call: Callable[[Tensor, Tensor, Caches], Tensor]
    config: FMDConfig  # of the reference


def cases(workload: Workload, dtype: torch.dtype, device: torch.device, ops: set[str]) -> Iterator[Case]:
    """``model_prefill`` and ``model_decode``, those that are in ``ops``."""
    print("model and references ...", file=sys.stderr)
    size, length = workload.size, workload.prompt.length
    model = build_thinker(size, length + 16, dtype, device)
    # One position more than the prompt: the token of the decode step.
    embeds = torch.randn(1, length + 1, size.hidden_size, device=device, dtype=dtype)
    labels = torch.cat([torch.from_numpy(workload.prompt.labels).to(device).long(), text_labels(1, device)], dim=1)
    runners = list(_runners(model, size.fork_layers))
    logits = _references(model, runners, embeds, labels)
    shapes = {
        "rows": length,
        "visual": workload.prompt.visual,
        "audio": workload.prompt.audio,
        "text": length - workload.prompt.visual - workload.prompt.audio,
        "layers": size.num_layers,
        "fork_layers": size.fork_layers,
    }
    if "model_prefill" in ops:
        candidates = [_prefill(runner, embeds, labels, logits[runner.config]) for runner in runners]
        yield Case("model_prefill", size.name, shapes, candidates)
    if "model_decode" in ops:
        candidates = [_decode(runner, embeds, labels, logits[runner.config]) for runner in runners]
        yield Case("model_decode", size.name, shapes, candidates)


def _runners(model: nn.Module, fork_layers: int) -> Iterator[Runner]:
    def settings(**given: Any) -> FMDConfig:
        return FMDConfig(**given).resolve(FMDConfig(), len(find_adapter(model).find_decoder(model).layers))

    def vanilla(embeds: Tensor, labels: Tensor, caches: Caches) -> Tensor:
        return model(inputs_embeds=embeds, past_key_values=caches[0], use_cache=True).logits

    yield Runner("vanilla", 1, vanilla, settings(fork_layers=0))
    for masking in reversed(MASKINGS):
        config = settings(fork_layers=fork_layers, masking=masking)
        yield Runner(f"{masking} masking", 1, _patched(model, config), config)
    config = settings(fork_layers=fork_layers, masking="zero", alpha=AUTO)
    yield Runner("zero masking, alpha auto", 1, _patched(model, config), config)
    config = settings(fork_layers=fork_layers, masking="zero")
    yield Runner("two passes", 2, TwoPasses(sharing_weights(model), config), config)


def _patched(model: nn.Module, config: FMDConfig) -> Callable[[Tensor, Tensor, Caches], Tensor]:
    patched = sharing_weights(model)
    fmd_ext.patch(patched, config)

    def call(embeds: Tensor, labels: Tensor, caches: Caches) -> Tensor:
        past = caches[0].get_seq_length()
        given = {"modality_labels": labels} if past == 0 else {}  # what comes later is text, without labels
        return patched(inputs_embeds=embeds, past_key_values=caches[0], use_cache=True, **given).logits

    return call


def _references(
    model: nn.Module, runners: list[Runner], embeds: Tensor, labels: Tensor
) -> dict[FMDConfig, tuple[Tensor, Tensor | None]]:
    """By config: logits [1, length + 1, vocabulary] in float32, and those of plain PyTorch in the model's dtype."""

    def logits(of: nn.Module, config: FMDConfig) -> Tensor:
        weight = next(of.parameters())
        hidden = reference_hidden(find_adapter(of).find_decoder(of), config, embeds.to(weight.dtype), labels)
        return of.get_output_embeddings()(hidden)

    low_precision = embeds.dtype != torch.float32
    exact = sharing_weights(model)
    if low_precision:
        for module in exact.modules():  # its own weights, so that the model keeps its
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))
    references = {}
    for config in {runner.config for runner in runners}:
        fixed = config.replace(alpha=_chosen_alpha(model, config, embeds, labels)) if config.alpha == AUTO else config
        references[config] = (logits(exact, fixed), logits(model, fixed) if low_precision else None)
    return references


def _chosen_alpha(model: nn.Module, config: FMDConfig, embeds: Tensor, labels: Tensor) -> dict[str, float]:
    """What alpha="auto" chooses for the prompt. That the choice is right is the tests' to say."""
    patched = sharing_weights(model)
    handle = fmd_ext.patch(patched, config)
    patched(inputs_embeds=embeds[:, :-1], modality_labels=labels[:, :-1])
    return dict(zip(MODALITIES, handle.last_plan.home_weights[0, VISUAL : AUDIO + 1].tolist(), strict=True))


def _reference(exact: Tensor, plain: Tensor | None) -> Reference:
    return Reference([exact], FLOAT32_ERROR) if plain is None else Reference.beside([exact], [plain])


def _prefill(runner: Runner, embeds: Tensor, labels: Tensor, logits: tuple[Tensor, Tensor | None]) -> Candidate:
    """The whole prompt into empty caches."""
    prompt, prompt_labels = embeds[:, :-1], labels[:, :-1]

    def run() -> Tensor:
        return runner.call(prompt, prompt_labels, _empty_caches(runner))

    reference = _reference(*(None if own is None else own[:, :-1] for own in logits))
    return Candidate(runner.name, Step(run), lambda out: [out], reference)


def _decode(runner: Runner, embeds: Tensor, labels: Tensor, logits: tuple[Tensor, Tensor | None]) -> Candidate:
    """One token behind the prompt; taken back, untimed, before the next."""
    length = embeds.shape[1] - 1
    caches = _empty_caches(runner)
    runner.call(embeds[:, :-1], labels[:, :-1], caches)

    def take_back() -> None:
        for cache in caches:
            cache.crop(length - cache.get_seq_length())

    def run() -> Tensor:
        return runner.call(embeds[:, -1:], labels[:, -1:], caches)

    reference = _reference(*(None if own is None else own[:, -1:] for own in logits))
    return Candidate(runner.name, Step(run, take_back), lambda out: [out], reference)


def _empty_caches(runner: Runner) -> Caches:
    return tuple(DynamicCache() for _ in range(runner.num_caches))
