"""``fmd-ext diagnose``: what one question about one clip attends to, with and without fork-merge decoding."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fmd_ext.cli import show
from fmd_ext.cli.answer import check_context, config_from, generate, patched
from fmd_ext.cli.ask import blaming_clip, check_settings, inputs_for, read_clip
from fmd_ext.cli.errors import UserError, blaming_input, check_folder, check_target
from fmd_ext.cli.models import load_model
from fmd_ext.config import FMDConfig
from fmd_ext.engine.routes import NEEDS
from fmd_ext.inputs.chat import last_question_token
from fmd_ext.inputs.media import check_clip
from fmd_ext.lab.calibration import PromptReading, read_prompt
from fmd_ext.lab.diagnose import AttentionShare, attention_share, plots

VANILLA, FORKED = "vanilla", "fork-merge"


def run(args: argparse.Namespace) -> int:
    if not args.question.strip():
        raise UserError("the question is empty")
    config = config_from(args)
    check_target(args.json)
    check_folder(args.plots)
    with blaming_clip():
        check_clip(args.clip, args.audio_track)
    loaded = load_model(args.model, args.dtype, args.device)
    check_settings(loaded, args, config)
    clip = read_clip(args, loaded.processor)
    if loaded.is_random:
        show.note("this model's weights are random: its attention and its words mean nothing")
    inputs = inputs_for(loaded, [clip], args)
    check_context(loaded, inputs, args.max_new_tokens)
    if clip.missing:
        show.note(f"the clip has no {clip.missing}, so nothing is forked")

    token = last_question_token(loaded.processor, args.question)
    answers = {VANILLA: generate(loaded, inputs, args.max_new_tokens)}
    shares = {VANILLA: attention_share(loaded.model, inputs, token)}
    with patched(loaded, config) as handle:
        settings = handle.config
        answers[FORKED] = generate(loaded, inputs, args.max_new_tokens)
        shares[FORKED] = attention_share(loaded.model, inputs, token)
        routes = handle.last_routes
        asked = "" if routes is None else handle.router.wording.about(args.question)
    reading = None
    if settings.masking == "zero":
        reading = read_prompt(loaded.model, inputs, mask_scale=settings.mask_scale)
    flips = plain(answers[VANILLA].text) != plain(answers[FORKED].text)

    console = Console()
    num_layers = loaded.model.config.get_text_config().num_hidden_layers
    print(f"fork-merge decoding: {show.describe(settings, num_layers)}")
    if asked:
        print(f"asked: {asked}")
        print(show.route(routes, settings))
    show.side_by_side(console, answers)
    print(f"the answer {'changes' if flips else 'stays the same'}\n")
    _layer_table(console, shares)
    if reading is not None:
        _print_reading(reading, settings)
    if args.json:
        facts = _facts(answers, shares, flips, settings, reading)
        likely = None if routes is None else dict(zip(NEEDS, routes.probabilities[0].tolist(), strict=True))
        facts["route"] = None if routes is None else {"asked": asked, "needs": likely}
        with blaming_input(OSError):
            Path(args.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if args.plots is not None:
        with blaming_input(OSError):
            path = plots.share_per_layer(shares, Path(args.plots) / "attention_per_layer.png")
        print(f"plot: {path}")
    show.cut_off(*answers.values())
    return 0


def plain(text: str) -> str:
    """For comparing answers: without case, the full stop at the end, and more than one blank between words."""
    return " ".join(text.casefold().split()).strip(" .")


def _layer_table(console: Console, shares: dict[str, AttentionShare]) -> None:
    """One row per layer, two where the fork has two branches: video, audio and text of each method."""
    table = Table(title="attention of the last question token, mean over heads", title_justify="left")
    table.add_column("layer", justify="right")
    for name, share in shares.items():
        if share.branches != ("all",):
            table.add_column("branch")
        for modality in ("video", "audio", "text"):
            table.add_column(f"{name}\n{modality}" if modality == "video" else f"\n{modality}", justify="right")
    num_layers = max(layer.layer for layer in shares[VANILLA].layers) + 1
    for index in range(num_layers):
        own = [[layer for layer in share.layers if layer.layer == index] for share in shares.values()]
        for line in range(max(map(len, own))):
            cells = [str(index + 1) if line == 0 else ""]
            for rows, share in zip(own, shares.values(), strict=True):
                row = rows[line] if line < len(rows) else None
                if share.branches != ("all",):
                    cells.append("" if row is None else "merged" if row.branch == "all" else row.branch)
                cells += ["" if row is None else f"{getattr(row, name):.0%}" for name in ("visual", "audio", "text")]
            table.add_row(*cells)
    console.print(table)


def _print_reading(reading: PromptReading, settings: FMDConfig) -> None:
    depth = reading.depth if settings.fork_layers == "auto" else settings.fork_layers
    alpha = ", ".join(f"{name} {value:.2f}" for name, value in reading.alpha(depth).items()) if depth else "none"
    print(
        f"by this prompt's own attention: fork_layers=auto is {reading.depth}; alpha=auto at {depth} layers is {alpha}"
    )


def _facts(
    answers: dict[str, Any],
    shares: dict[str, AttentionShare],
    flips: bool,
    settings: FMDConfig,
    reading: PromptReading | None,
) -> dict[str, Any]:
    """All that was found, as JSON holds it."""
    return {
        "settings": dataclasses.asdict(settings),
        "answers": {name: answer.text for name, answer in answers.items()},
        "flips": flips,
        "attention": {name: [dataclasses.asdict(layer) for layer in share.layers] for name, share in shares.items()},
        "fork_shares": None if reading is None else reading.layers.tolist(),
        "auto": None if reading is None else {"fork_layers": reading.depth, "alpha": reading.alpha(reading.depth)},
    }
