"""``fmd-ext demo``: the method at work without a download."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from fmd_ext.chat import last_question_token, prepare_inputs
from fmd_ext.cli import show
from fmd_ext.cli.answer import Answer, check_context, config_from, generate, patched
from fmd_ext.cli.errors import UserError, blaming_input, notes_from_warnings
from fmd_ext.cli.models import load_model
from fmd_ext.diagnose import attention_share
from fmd_ext.media import load_clip
from fmd_ext.tiny import write_clip

ROUNDS = 3
LONGEST_CLIP = 30  # seconds


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    if args.seconds > LONGEST_CLIP:
        raise UserError(f"--seconds must be at most {LONGEST_CLIP}, which is what the built-in model hears")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="fmd_ext_") as folder:
        clip = load_clip(write_clip(Path(folder) / "demo.mp4", seconds=args.seconds, seed=args.seed))
    loaded = load_model(None, device="cpu", seed=args.seed)
    with notes_from_warnings(), blaming_input(ValueError):
        inputs = prepare_inputs(loaded.processor, clip, args.question, use_audio_in_video=args.interleaved)
    check_context(loaded, inputs, args.max_new_tokens)

    labels = inputs["input_ids"][0]
    num_visual = int((labels == loaded.model.config.video_token_id).sum())
    num_audio = int((labels == loaded.model.config.audio_token_id).sum())
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    size = loaded.model.num_parameters() / 1e6
    text_line(console, f"model: {loaded.name}, {num_layers} layers, {size:.1f} M parameters")
    text_line(console, "       The weights are random: the words of its answers mean nothing.")
    text_line(
        console,
        f"clip:  {clip.duration_s:.1f} s, {len(clip.frames)} frames -> {num_visual} video tokens, sound -> {num_audio} "
        f"audio tokens, {len(labels) - num_visual - num_audio} text tokens, "
        f"{'interleaved' if args.interleaved else 'video before audio'}",
    )
    text_line(console, f"question: {args.question}")

    token = last_question_token(loaded.processor, args.question)
    vanilla, forked = "vanilla", "fork-merge decoding"
    runs: dict[str, list[Answer]] = {vanilla: [], forked: []}
    shares = {vanilla: attention_share(loaded.model, inputs, token)}
    with patched(loaded, config) as settings:
        shares[forked] = attention_share(loaded.model, inputs, token)
    text_line(console, f"fork-merge decoding: {show.describe(settings, num_layers)}\n")

    # In turn, so that a machine that is busy for a while is busy for both.
    for _ in tqdm(range(ROUNDS), desc="answering", delay=1.0, leave=False):
        runs[vanilla].append(generate(loaded, inputs, args.max_new_tokens, exactly=True))
        with patched(loaded, config):
            runs[forked].append(generate(loaded, inputs, args.max_new_tokens, exactly=True))
    answers = {name: median(repeats) for name, repeats in runs.items()}
    show.side_by_side(console, answers)
    show.attention(console, shares)
    if settings.masking == "zero" and settings.fork_layers:
        text_line(console, "(zero masking: a branch still attends to the masked positions, which carry nothing)")
    show.timings(console, answers, f"median of {ROUNDS} runs")
    return 0


def median(repeats: list[Answer]) -> Answer:
    """The same answer with the median of the timings."""
    rates = [answer.tokens_per_s for answer in repeats if answer.tokens_per_s is not None]
    return dataclasses.replace(
        repeats[0],
        first_token_s=statistics.median(answer.first_token_s for answer in repeats),
        tokens_per_s=statistics.median(rates) if rates else None,
    )


def text_line(console: Console, text: str) -> None:
    """One line as it is: not wrapped, not coloured, no markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
