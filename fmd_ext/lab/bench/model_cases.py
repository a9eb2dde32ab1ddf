"""Prefill and decode step of a whole model: vanilla on SDPA, both maskings patched, and the paper's two passes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.adapters import find_adapter
from fmd_ext.compat import cache_kwargs
from fmd_ext.config import AUTO, MASKINGS, MODALITIES
from fmd_ext.engine.reference import reference_hidden
from fmd_ext.labels import AUDIO, VISUAL

from .cases import Candidate, Case
from .checking import Reference
from .models import TwoPasses, build_thinker, sharing_weights, text_labels
from .roofline import Work
from .timing import Step
from .workload import Workload

# float32 against the reference in float32: what the project promises for logits, which are of order 1.
FLOAT32_ERROR = 1e-4

NEW_TOKENS, QUICK_NEW_TOKENS = 32, 4
TOKEN = torch.tensor([[40]])  # fed in decode steps: any word of the vocabulary
ASKED_TOKENS = 64  # of a prompt that asks what a question needs: template 20, question 20, asking 24

Caches = tuple[DynamicCache, ...]
Logits = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run the model: ``call`` takes embeddings and labels behind the caches and returns logits."""

    name: str
    num_caches: int
    call: Callable[[Tensor, Tensor, Caches], Tensor]
    config: FMDConfig  # of the reference
    fusions: bool | None = None  # of `patch`


def cases(workload: Workload, dtype: torch.dtype, device: torch.device, ops: set[str]) -> Iterator[Case]:
    """``model_prefill``, ``model_decode`` and ``model_generate``, those that are in ``ops``."""
    print("model and references ...", file=sys.stderr)
    size, length = workload.size, workload.prompt.length
    new_tokens = NEW_TOKENS if length >= 1000 else QUICK_NEW_TOKENS
    model = build_thinker(size, length + 16 + new_tokens, dtype, device)
    # One position more than the prompt: the token of the decode step.
    embeds = torch.randn(1, length + 1, size.hidden_size, device=device, dtype=dtype)
    labels = torch.cat([torch.from_numpy(workload.prompt.labels).to(device).long(), text_labels(1, device)], dim=1)
    embeds[:, -1:] = model.get_input_embeddings()(TOKEN.to(device))
    ways = list(_ways(model, size.fork_layers))
    references = References(model, low_precision=dtype != torch.float32)
    logits = {config: references.logits(config, embeds, labels) for config in {way.config for way in ways}}
    work = _least_work(model, length)
    shapes = {
        "rows": length,
        "visual": workload.prompt.visual,
        "audio": workload.prompt.audio,
        "text": length - workload.prompt.visual - workload.prompt.audio,
        "layers": size.num_layers,
        "fork_layers": size.fork_layers,
    }
    if "model_prefill" in ops:
        candidates = [_prefill(way, embeds, labels, logits[way.config]) for way in ways]
        yield Case("model_prefill", size.name, shapes, candidates, work["model_prefill"])
    if "model_decode" in ops:
        candidates = [_decode(way, embeds, labels, logits[way.config]) for way in ways]
        static = ways[:3] + [way for way in ways if way.fusions is not None]
        candidates += [_static_decode(model, way, embeds, labels, logits[way.config]) for way in static]
        yield Case("model_decode", size.name, shapes, candidates, work["model_decode"])
    if "model_generate" in ops:
        candidates = list(_generates(model, ways[:3], embeds, labels, references, new_tokens))
        # The first new token's logits come from the position behind the prompt; then every token is a step.
        least = Work(new_tokens * work["model_decode"].bytes, new_tokens * work["model_decode"].flops)
        yield Case("model_generate", size.name, {**shapes, "new_tokens": new_tokens}, candidates, least)


def _ways(model: nn.Module, fork_layers: int) -> Iterator[Way]:
    def settings(**given: Any) -> FMDConfig:
        return FMDConfig(**given).resolve(FMDConfig(), len(find_adapter(model).find_decoder(model).layers))

    def vanilla(embeds: Tensor, labels: Tensor, caches: Caches) -> Tensor:
        return model(inputs_embeds=embeds, **cache_kwargs(caches[0]), use_cache=True).logits

    yield Way("vanilla", 1, vanilla, settings(fork_layers=0))
    for masking in reversed(MASKINGS):
        config = settings(fork_layers=fork_layers, masking=masking)
        yield Way(f"{masking} masking", 1, _patched(model, config), config)
    config = settings(fork_layers=fork_layers, masking="zero", alpha=AUTO)
    yield Way("zero masking, alpha auto", 1, _patched(model, config), config)
    config = settings(fork_layers=fork_layers, masking="zero")
    yield Way("two passes", 2, TwoPasses(sharing_weights(model), config), config)
    config = settings(fork_layers=fork_layers, masking="attention", text_weight=0.9)
    yield Way("attention masking, asked first", 1, _asked_first(model, config), config)
    config = settings(fork_layers=fork_layers, masking="zero")
    for name, fusions in (("no fusions", False), ("all fusions", True)):
        yield Way(f"zero masking, {name}", 1, _patched(model, config, fusions), config, fusions)


def _patched(
    model: nn.Module, config: FMDConfig, fusions: bool | None = None
) -> Callable[[Tensor, Tensor, Caches], Tensor]:
    patched = sharing_weights(model)
    fmd_ext.patch(patched, config, fusions=fusions)

    def call(embeds: Tensor, labels: Tensor, caches: Caches) -> Tensor:
        past = caches[0].get_seq_length()
        given = {"modality_labels": labels} if past == 0 else {}  # what comes later is text, without labels
        return patched(inputs_embeds=embeds, **cache_kwargs(caches[0]), use_cache=True, **given).logits

    return call


def _asked_first(model: nn.Module, config: FMDConfig) -> Callable[[Tensor, Tensor, Caches], Tensor]:
    """As with text_weight="auto" and a new question: a prompt of its own that asks, then the clip's."""
    patched = _patched(model, config)
    decoder, head = find_adapter(model).find_decoder(model), model.get_output_embeddings()
    ids = torch.arange(ASKED_TOKENS, device=head.weight.device)[None]

    def call(embeds: Tensor, labels: Tensor, caches: Caches) -> Tensor:
        if caches[0].get_seq_length() == 0:
            head(decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]).argmax().item()  # it is waited for
        return patched(embeds, labels, caches)

    return call


class References:
    """Logits by the reference, of ``model``'s weights in float32 and, for a low-precision model, in its own dtype."""

    def __init__(self, model: nn.Module, low_precision: bool) -> None:
        self.model = model
        self.low_precision = low_precision
        self.exact = sharing_weights(model)
        if low_precision:
            for module in self.exact.modules():  # its own weights, so that the model keeps its
                for name, weight in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))

    def logits(self, config: FMDConfig, embeds: Tensor, labels: Tensor) -> Logits:
        """[1, length, vocabulary], exact and those of plain PyTorch in the model's dtype (None where that is exact)."""
        if config.alpha == AUTO:
            config = config.replace(alpha=_chosen_alpha(self.model, config, embeds, labels))

        def of(model: nn.Module) -> Tensor:
            weight = next(model.parameters())
            hidden = reference_hidden(find_adapter(model).find_decoder(model), config, embeds.to(weight.dtype), labels)
            return model.get_output_embeddings()(hidden)

        return of(self.exact), of(self.model) if self.low_precision else None


def _chosen_alpha(model: nn.Module, config: FMDConfig, embeds: Tensor, labels: Tensor) -> dict[str, float]:
    """What alpha="auto" chooses for the prompt. That the choice is right is the tests' to say."""
    patched = sharing_weights(model)
    handle = fmd_ext.patch(patched, config)
    patched(inputs_embeds=embeds[:, :-1], modality_labels=labels[:, :-1])
    return dict(zip(MODALITIES, handle.last_call.home_weights[0, VISUAL : AUDIO + 1].tolist(), strict=True))


def _reference(exact: Tensor, plain: Tensor | None) -> Reference:
    return Reference([exact], FLOAT32_ERROR) if plain is None else Reference.beside([exact], [plain])


def _prefill(way: Way, embeds: Tensor, labels: Tensor, logits: Logits) -> Candidate:
    """The whole prompt into empty caches."""
    prompt, prompt_labels = embeds[:, :-1], labels[:, :-1]

    def run() -> Tensor:
        return way.call(prompt, prompt_labels, _empty_caches(way))

    reference = _reference(*(None if own is None else own[:, :-1] for own in logits))
    return Candidate(way.name, Step(run, from_idle=True), lambda out: [out], reference)


def _decode(way: Way, embeds: Tensor, labels: Tensor, logits: Logits) -> Candidate:
    """One token behind the prompt; taken back, untimed, before the next."""
    length = embeds.shape[1] - 1
    caches = _empty_caches(way)
    way.call(embeds[:, :-1], labels[:, :-1], caches)

    def take_back() -> None:
        for cache in caches:
            cache.crop(length - cache.get_seq_length())

    def run() -> Tensor:
        return way.call(embeds[:, -1:], labels[:, -1:], caches)

    reference = _reference(*(None if own is None else own[:, -1:] for own in logits))
    return Candidate(way.name, Step(run, take_back, from_idle=True), lambda out: [out], reference)


def _static_decode(model: nn.Module, way: Way, embeds: Tensor, labels: Tensor, logits: Logits) -> Candidate:
    """The same step by the decode runner, over static buffers; its buffers are set back, untimed, before the next."""
    patched = sharing_weights(model)
    runner = fmd_ext.patch(patched, way.config, runner=True, fusions=way.fusions).runner
    length, cache, token = embeds.shape[1] - 1, DynamicCache(), TOKEN.to(embeds.device)
    patched(inputs_embeds=embeds[:, :-1], **cache_kwargs(cache), modality_labels=labels[:, :-1])
    call = {"input_ids": token, "position_ids": torch.full_like(token, length), "use_cache": True}
    decoding = runner.begin(patched, cache, call, remaining=1)

    def take_back() -> None:
        if decoding.step is not None:
            decoding.step.load(decoding.step.call, decoding.inputs)
            decoding.room, decoding.fed = decoding.room + decoding.fed, 0

    reference = _reference(*(None if own is None else own[:, -1:] for own in logits))
    step = Step(lambda: decoding.feed(token[0]), take_back, from_idle=True)
    return Candidate(f"{way.name}, runner", step, lambda out: [out[:, None]], reference)


class RecomputedLogits(Reference):
    """What ``generate`` must have seen: its tokens' logits by the reference, which gets those tokens as its input."""

    def __init__(self, references: References, config: FMDConfig, embeds: Tensor, labels: Tensor) -> None:
        super().__init__([], 0.0)
        self.__dict__.update(references=references, config=config, embeds=embeds, labels=labels)

    def check(self, name: str, output: Sequence[Tensor]) -> float:
        """``output``: tokens [1, n] and their logits [1, n, vocabulary]."""
        tokens, logits = output
        count = tokens.shape[1]
        new = self.references.model.get_input_embeddings()(tokens[:, :-1])
        text = text_labels(count - 1, tokens.device)
        embeds, labels = torch.cat([self.embeds, new], dim=1), torch.cat([self.labels, text], dim=1)
        exact, plain = self.references.logits(self.config, embeds, labels)
        return _reference(exact[:, -count:], None if plain is None else plain[:, -count:]).check(name, [logits])


def _generates(
    model: nn.Module, ways: Sequence[Way], embeds: Tensor, labels: Tensor, references: References, count: int
) -> Iterator[Candidate]:
    """``generate`` behind a cached prompt: transformers' token loop, and the decode runner's."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    for runner in (False, True):
        for way in ways:
            patched = sharing_weights(model)
            if runner or way.config.fork_layers:
                fmd_ext.patch(patched, way.config, runner=runner)
                given = {"modality_labels": labels}
            else:
                given = {}
            call = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(labels), **given}
            yield _generate(way, patched, {**call, **options}, RecomputedLogits(references, way.config, embeds, labels))


def _generate(way: Way, model: nn.Module, call: dict[str, Any], reference: Reference) -> Candidate:
    handle = fmd_ext.handle_of(model)
    labels = {name: value[:, :-1] for name, value in call.items() if name == "modality_labels"}
    caches: list[DynamicCache] = []

    def prefill() -> None:
        caches[:] = [DynamicCache()]
        model(inputs_embeds=call["inputs_embeds"][:, :-1], **cache_kwargs(caches[0]), use_cache=True, **labels)

    def run() -> Any:
        return model.generate(**call, **cache_kwargs(caches[0]))

    def output(out: Any) -> list[Tensor]:
        return [out.sequences, torch.stack(out.logits, dim=1)]

    runs_static = handle is not None and handle.runner.wanted
    name = f"{way.name}, runner" if runs_static else way.name
    return Candidate(name, Step(run, prefill, from_idle=True), output, reference)


def _least_work(model: nn.Module, length: int) -> dict[str, Work]:
    """Of the unpatched model: in a decode step every weight and key is read once; in a prefill every weight is used for
    every row."""
    decoder, head = find_adapter(model).find_decoder(model), model.get_output_embeddings().weight
    layers = sum(weight.numel() for weight in decoder.layers.parameters())
    config, size = decoder.config, head.element_size()
    head_dim = config.hidden_size // config.num_attention_heads
    cached = 2 * len(decoder.layers) * length * config.num_key_value_heads * head_dim
    pairs = len(decoder.layers) * config.num_attention_heads * head_dim * length**2 // 2
    weights = layers + head.numel()
    return {
        "model_decode": Work((weights + cached) * size, 2 * weights),
        "model_prefill": Work(weights * size, 2 * layers * length + 2 * head.numel() * length + 4 * pairs),
    }


def _empty_caches(way: Way) -> Caches:
    return tuple(DynamicCache() for _ in range(way.num_caches))
