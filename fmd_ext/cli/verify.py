"""``fmd-ext verify``: a model, with the weights it has, against two plain passes of itself."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fmd_ext.adapters import find_adapter
from fmd_ext.cli.answer import check_context, patched
from fmd_ext.cli.ask import blaming_clip, inputs_for, read_clip
from fmd_ext.cli.errors import UserError
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import MASKINGS, FMDConfig
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.inputs.media import check_clip
from fmd_ext.inputs.sample_clip import write_clip

# Root mean square of the difference from two plain passes, over that of the logits: what rounding may make of it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Mixtures of experts need more in low precision, since rounding moves a token to another expert: plain PyTorch in
# bfloat16 takes a small random Qwen3-Omni 0.05 away from itself in float32.
EXPERTS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
EQUAL = "equal"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits at all positions and greedy tokens of one masking.

    Attributes:
        error: root mean square of patched minus two plain passes, over that of the logits.
        effect: the same of two plain passes minus the unpatched model: what forking changes at all.
        same_tokens: tokens that patched decoding from the cache and full recompute have in common from the start.
    """

    error: float
    effect: float
    same_tokens: int

    def verdict(self, dtype: torch.dtype, tolerance: float, num_tokens: int) -> str:
        close = self.error <= min(tolerance, self.effect / 2)
        # In low precision rounding decides between nearly equal words.
        return EQUAL if close and (dtype != torch.float32 or self.same_tokens == num_tokens) else "DIFFERENT"


def run(args: argparse.Namespace) -> int:
    if args.fork_layers == 0:
        raise UserError("--fork-layers 0 is the untouched model: there is nothing to verify")
    if args.clip is not None:
        with blaming_clip():
            check_clip(args.clip)
    loaded = load_model(args.model, args.dtype, args.device)
    with tempfile.TemporaryDirectory(prefix="fmd_ext_") as folder:
        args.clip = args.clip or str(write_clip(Path(folder) / "made.mp4", seconds=4.0))
        clip = read_clip(args, loaded.processor)
    if clip.missing:
        raise UserError(f"{args.clip} has no {clip.missing}: nothing would be forked, so there is nothing to verify")
    inputs = inputs_for(loaded, clip, args)
    check_context(loaded, inputs, args.max_new_tokens)

    model, dtype = loaded.model, loaded.model.dtype
    text = model.config.get_text_config()
    num_layers = text.num_hidden_layers
    has_experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts"))
    tolerance = (EXPERTS_TOLERANCE if has_experts else TOLERANCE)[dtype]
    # Channel-wise fusion has no second way of masking.
    maskings = MASKINGS[:1] if find_adapter(model).branch_inputs else MASKINGS
    table = Table("masking", "error", "effect of forking", f"same of {args.max_new_tokens} tokens", "verdict")
    verdicts = []
    for masking in maskings:
        settings, found = compare(loaded, inputs, FMDConfig(args.fork_layers, masking), args.max_new_tokens)
        verdicts.append(found.verdict(dtype, tolerance, args.max_new_tokens))
        numbers = (f"{found.error:.1e}", f"{found.effect:.1e}", str(found.same_tokens))
        table.add_row(masking, *numbers, verdicts[-1])
    print(f"{loaded.name}, {dtype}, {inputs['input_ids'].shape[1]} positions, {settings.fork_layers} of {num_layers}")
    print("layers forked: the patched model against two plain passes of the unpatched one")
    Console().print(table)
    print(f"error, effect: root mean square over that of the logits. equal: error at most {tolerance:g}, and at")
    print("most half the effect; in float32 also the same greedy tokens, from the cache and by full recompute.")
    return int(any(verdict != EQUAL for verdict in verdicts))


def compare(
    loaded: LoadedModel, inputs: dict[str, Any], config: FMDConfig, max_new_tokens: int
) -> tuple[FMDConfig, Comparison]:
    """The settings in force, and how far the patched model is from two plain passes."""
    model = loaded.model
    # Plain greedy decoding, whatever the model's own generation settings say.
    options = {"do_sample": False, "repetition_penalty": 1.0, "suppress_tokens": None, "eos_token_id": None}
    with torch.no_grad():
        vanilla = model(**inputs).logits.float()
        with patched(loaded, config) as settings:
            ours = model(**inputs).logits.float()
            tokens = model.generate(**inputs, **options, max_new_tokens=max_new_tokens)[0, -max_new_tokens:]
        plain = reference_logits(model, settings, **inputs).float()
        expected = reference_generate(model, settings, max_new_tokens, **inputs)[0]
    differing = (tokens != expected.to(tokens.device)).nonzero()
    return settings, Comparison(
        error=_relative(ours - plain, plain),
        effect=_relative(plain - vanilla, plain),
        same_tokens=int(differing[0]) if len(differing) else max_new_tokens,
    )


def _relative(difference: torch.Tensor, values: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt() / values.square().mean().sqrt())
