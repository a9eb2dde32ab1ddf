"""``fmd-ext verify``: a model, with the weights it has, against two plain passes of itself."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fmd_ext.adapters import find_adapter
from fmd_ext.cli.answer import are_finite, check_context, not_finite, patched
from fmd_ext.cli.ask import blaming_clip, check_settings, inputs_for, read_clip
from fmd_ext.cli.errors import UserError
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import MASKINGS, FMDConfig
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.inputs.media import Clip, check_clip
from fmd_ext.inputs.sample_clip import write_clip
from fmd_ext.patching import handle_of
from fmd_ext.patching.fusions.put_on import Fusion

# Root mean square of the difference from two plain passes, over that of the logits: what rounding may make of it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Mixtures of experts need more in low precision, since rounding moves a token to another expert: plain PyTorch in
# bfloat16 takes a small random Qwen3-Omni 0.05 away from itself in float32.
EXPERTS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of an unpatched model whose rows depend on which others share their call (activations quantised to 8 bits): times its
# own spread. The patched model's error is about once that.
SPREADS = 2.0
EQUAL = "equal"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits at all positions and greedy tokens of one masking.

    Attributes:
        error: root mean square of patched minus two plain passes, over that of the logits.
        effect: the same of two plain passes minus the unpatched model: what forking changes at all.
        same_tokens: tokens that patched decoding from the cache and full recompute have in common from the start.
        fusions: of the patched model, see `Handle.fusions`.
    """

    error: float
    effect: float
    same_tokens: int
    fusions: dict[str, Fusion]

    def verdict(self, tolerance: float, num_tokens: int) -> str:
        close = self.error <= min(tolerance, self.effect / 2)
        # In low precision rounding decides between nearly equal words.
        exact = tolerance <= TOLERANCE[torch.float32]
        return EQUAL if close and (not exact or self.same_tokens == num_tokens) else "DIFFERENT"


def run(args: argparse.Namespace) -> int:
    if args.fork_layers == 0:
        raise UserError("--fork-layers 0 is the untouched model: there is nothing to verify")
    if args.clip is not None:
        with blaming_clip():
            check_clip(args.clip, args.audio_track)
    loaded = load_model(args.model, args.dtype, args.device)
    check_settings(loaded, args, FMDConfig(args.fork_layers))
    with tempfile.TemporaryDirectory(prefix="fmd_ext_") as folder:
        args.clip = args.clip or str(write_clip(Path(folder) / "made.mp4", seconds=4.0))
        clip = read_clip(args, loaded.processor)
    if clip.missing:
        raise UserError(f"{args.clip} has no {clip.missing}: nothing would be forked, so there is nothing to verify")
    inputs = inputs_for(loaded, [clip], args)
    check_context(loaded, inputs, args.max_new_tokens)

    model, dtype = loaded.model, loaded.model.dtype
    text = model.config.get_text_config()
    num_layers = text.num_hidden_layers
    has_experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts"))
    with torch.no_grad():
        vanilla = model(**inputs).logits.float()
        if not are_finite(vanilla):
            raise not_finite(dtype)
        spread = _spread(loaded, clip, vanilla, args)
    tolerance = max((EXPERTS_TOLERANCE if has_experts else TOLERANCE)[dtype], SPREADS * spread)
    # Channel-wise fusion has no second way of masking.
    maskings = MASKINGS[:1] if find_adapter(model).branch_inputs else MASKINGS
    table = Table("masking", "error", "effect of forking", f"same of {args.max_new_tokens} tokens", "verdict")
    verdicts = []
    for masking in maskings:
        config = FMDConfig(args.fork_layers, masking)
        settings, found = compare(loaded, inputs, vanilla, config, args.max_new_tokens)
        verdicts.append(found.verdict(tolerance, args.max_new_tokens))
        numbers = (f"{found.error:.1e}", f"{found.effect:.1e}", str(found.same_tokens))
        table.add_row(masking, *numbers, verdicts[-1])
    print(f"{loaded.name}, {dtype}, {inputs['input_ids'].shape[1]} positions, {settings.fork_layers} of {num_layers}")
    print("layers forked: the patched model against two plain passes of the unpatched one")
    Console().print(table)
    print(f"error, effect: root mean square over that of the logits. equal: error at most {tolerance:.2g}, and at")
    print("most half the effect; in float32 also the same greedy tokens, from the cache and by full recompute.")
    for name, fusion in found.fusions.items():
        print(f"fusion {name}: {fusion}")
    if tolerance == SPREADS * spread:
        print(
            f"The unpatched model itself differs by {spread:.1e} when the prompt shares a batch with another, as where"
        )
        print(f"activations are quantised together: {SPREADS:g} times that is allowed, and tokens are not compared.")
    return int(any(verdict != EQUAL for verdict in verdicts))


def _spread(loaded: LoadedModel, clip: Clip, vanilla: torch.Tensor, args: argparse.Namespace) -> float:
    """How far the unpatched model's logits are from ``vanilla`` when the prompt shares its call with another one.

    The other one is about the negative of the picture and the sound played backwards, so that both are as long.
    """
    other = dataclasses.replace(clip, frames=255 - clip.frames, audio=np.ascontiguousarray(clip.audio[::-1]))
    logits = loaded.model(**inputs_for(loaded, [clip, other], args, tell=False)).logits
    return _relative(logits[:1].float() - vanilla, vanilla)


def compare(
    loaded: LoadedModel, inputs: dict[str, Any], vanilla: torch.Tensor, config: FMDConfig, max_new_tokens: int
) -> tuple[FMDConfig, Comparison]:
    """The settings in force, and how far the patched model is from two plain passes.

    Args:
        vanilla: float32 [1, positions, vocabulary], the unpatched model's logits.
    """
    model = loaded.model
    # Plain greedy decoding, whatever the model's own generation settings say.
    options = {"do_sample": False, "repetition_penalty": 1.0, "suppress_tokens": None, "eos_token_id": None}
    with torch.no_grad():
        with patched(loaded, config) as handle:
            settings = handle.config
            ours = model(**inputs).logits.float()
            fusions = handle_of(model).fusions
            tokens = model.generate(**inputs, **options, max_new_tokens=max_new_tokens)[0, -max_new_tokens:]
        routes = handle.last_routes
        own = settings if routes is None else routes.settings(settings)
        plain = reference_logits(model, own, **inputs).float()
        if not are_finite(plain):
            raise not_finite(model.dtype)
        expected = reference_generate(model, own, max_new_tokens, **inputs)[0]
    differing = (tokens != expected.to(tokens.device)).nonzero()
    return settings, Comparison(
        error=_relative(ours - plain, plain),
        effect=_relative(plain - vanilla, plain),
        same_tokens=int(differing[0]) if len(differing) else max_new_tokens,
        fusions=fusions,
    )


def _relative(difference: torch.Tensor, values: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt() / values.square().mean().sqrt())
