"""``fmd-ext calibrate``: alpha from attention, fork depth from accuracy, both into a file that other commands load."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
import torch
from rich.console import Console
from tqdm import tqdm

from fmd_ext.cli import show
from fmd_ext.cli.answer import config_from
from fmd_ext.cli.errors import UserError, blaming_input, notes_from_warnings
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import AUTO, FMDConfig
from fmd_ext.inputs.chat import to_device
from fmd_ext.lab.calibration import (
    AlphaEstimate,
    DepthScore,
    PromptReading,
    candidate_depths,
    choose_depth,
    estimate_alpha,
    read_prompt,
    split_by_video,
)
from fmd_ext.lab.cli.eval import reading_from, run_settings
from fmd_ext.lab.cli.questions import load_questions, usable
from fmd_ext.lab.eval.benchmarks import Loaded
from fmd_ext.lab.eval.clips import ClipInputs, Reading, reason_of
from fmd_ext.lab.eval.generation import Decoding, token_limits
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.methods import METHODS, Choice, parse_methods
from fmd_ext.lab.eval.predictions import Results, ResultsError
from fmd_ext.lab.eval.run import Runner
from fmd_ext.lab.eval.scores import ALL, evaluate
from fmd_ext.lab.eval.statistics import require_scipy
from fmd_ext.lab.eval.tables import Table
from fmd_ext.lab.eval.wording import against, percent


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    _refuse(config)
    if not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {Path(args.out).absolute().parent}")
    with blaming_input(ImportError):
        require_scipy()
    if args.plots is not None:
        from fmd_ext.lab.plotting import matplotlib_

        with blaming_input(ImportError):
            matplotlib_()
    loaded = load_questions(args)
    questions = [item for item in usable(args, loaded, loaded.items) if item.kind != "caption"]
    measured, validation = split_by_video(questions, args.samples, args.validation)
    if not measured:
        raise UserError("none of the questions has a yes, a choice or a word for an answer: alpha is measured on these")
    for what, part, asked in (("--samples", measured, args.samples), ("--validation", validation, args.validation)):
        if len(part) < asked:
            show.note(f"{what} {asked}: {len(part)} questions, since the two share no video")

    model = load_model(args.model, args.dtype, args.device)
    if model.is_random:
        show.note("this model's weights are random: what is measured means nothing")
    reading = reading_from(args)
    readings = _read(model, measured, reading, config.mask_scale or 0.0)
    depths = _depths(args, config, model, bool(validation))
    with blaming_input(ValueError):
        estimates = {depth: estimate_alpha(readings, depth) for depth in depths}
    scores: list[DepthScore] = []
    table = None
    if validation:
        choices = [_choice(config, estimates[depth]) for depth in depths]
        results = _answer(args, loaded, model, validation, [*parse_methods("vanilla"), *choices], reading)
        with blaming_input(ResultsError):
            (table, *_) = evaluate(results).tables
        scores = [_score(depth, table, choice) for depth, choice in zip(depths, choices, strict=True)]
    depth = choose_depth(scores).fork_layers if scores else depths[0]
    found = config.replace(fork_layers=depth, alpha=estimates[depth].alpha, masking="zero")
    _print(estimates, scores, table, depth)
    accuracy = None if table is None else _against_vanilla(table, _choice(config, estimates[depth]))
    record = {
        "model": model.name,
        "random_weights": model.is_random,
        "benchmark": loaded.benchmark.name,
        "questions": loaded.digest,
        "prompts_without_a_fork": len(measured) - len(readings),
        "alpha": [dataclasses.asdict(estimate) for estimate in estimates.values()],
        "alpha_of_prompts": [list(reading.alpha(depth).values()) for reading in readings],
        "depths": [dataclasses.asdict(score) for score in scores],
        "accuracy": accuracy,
        "videos": {name: _videos(part) for name, part in (("measured", measured), ("validated", validation))},
        "measured_on": [item.id for item in measured],
        "validated_on": [item.id for item in validation],
    }
    with blaming_input(OSError):
        found.to_file(args.out, calibration=record)
        if args.plots is not None:
            methods = {own: _choice(config, estimate).name for own, estimate in estimates.items()}
            _plot(Path(args.plots), readings, depth, table if len(depths) > 1 else None, methods)
    print(f"settings: {args.out}")
    return 0


def _videos(items: list[Item]) -> list[str]:
    return sorted({item.video for item in items})


def _against_vanilla(table: Table, choice: Choice) -> dict[str, Any]:
    """Accuracy of vanilla and of the choice on the validation questions; a note where vanilla is better."""
    cells = table.rows[ALL]
    vanilla, chosen = cells["vanilla"], cells[choice.name]
    if chosen.accuracy.value < vanilla.accuracy.value:
        show.note(
            f"vanilla decoding is better on the validation questions: {percent(vanilla.accuracy)} % against "
            f"{percent(chosen.accuracy)} %; difference {against(chosen)}"
        )
    return {
        "vanilla": vanilla.accuracy.value,
        "chosen": chosen.accuracy.value,
        "difference": dataclasses.asdict(chosen.comparison.difference),
        "p_value": chosen.comparison.p_value,
        "vanilla_is_better": chosen.accuracy.value < vanilla.accuracy.value,
    }


def _refuse(config: FMDConfig) -> None:
    if config.masking == "attention":
        raise UserError("with --masking attention there is no alpha to measure; choose its depth with fmd-ext eval")
    for name in ("alpha", "fork_layers"):
        if getattr(config, name) == AUTO:
            raise UserError(f"{name}=auto needs no calibration: every prompt chooses for itself")
    if config.alpha is not None:
        raise UserError("alpha is what is measured; leave --alpha unset")


def _depths(args: argparse.Namespace, config: FMDConfig, model: LoadedModel, can_validate: bool) -> list[int]:
    """One depth where it is given or cannot be validated; else those to try."""
    num_layers = model.model.config.get_text_config().num_hidden_layers
    if config.fork_layers is not None:
        depths = [config.fork_layers]
    elif not can_validate:
        depths = [FMDConfig().resolve(FMDConfig(), num_layers).fork_layers]
        show.note(f"no questions to validate on: the fork depth is the default, {depths[0]} of {num_layers} layers")
    else:
        depths = sorted(set(args.depths or candidate_depths(num_layers)))
    if not 1 <= depths[0] <= depths[-1] <= num_layers:
        raise UserError(f"depths must be 1 to {num_layers}, the number of layers; got {', '.join(map(str, depths))}")
    return depths


def _read(model: LoadedModel, items: list[Item], reading: Reading, mask_scale: float) -> list[PromptReading]:
    """Of the prompts that fork; one that cannot be read is left out, with a note."""

    def refuse(width: int, _: Sequence[Item]) -> str | None:
        limit = model.context_limit
        return f"prompt of {width} tokens exceeds the model's limit of {limit}" if limit and width > limit else None

    clips, readings = ClipInputs(model.processor, reading, refuse), []
    for item in tqdm(items, desc="reading prompts", unit="prompt", disable=None):
        (group,) = clips.prepare([item])
        error = group.error
        if group.inputs is not None:
            try:
                inputs = to_device(group.inputs, model.model.device)
                own = read_prompt(model.model, inputs, mask_scale=mask_scale, cluster=item.video)
                readings += [own] * (own is not None)
            except (torch.OutOfMemoryError, ValueError) as failure:
                error = reason_of(failure)
        if error:
            show.note(f"{item.id} is left out: {error}")
    return readings


def _choice(config: FMDConfig, estimate: AlphaEstimate) -> Choice:
    more = {name: getattr(config, name) for name in ("mask_scale", "text_weight")}
    settings = {name: value for name, value in more.items() if value is not None}
    return Choice(METHODS["fmd-zero"], {"fork_layers": estimate.fork_layers, "alpha": estimate.alpha, **settings})


def _answer(
    args: argparse.Namespace,
    loaded: Loaded,
    model: LoadedModel,
    items: list[Item],
    choices: list[Choice],
    reading: Reading,
) -> Results:
    """Answers the validation questions; a folder that holds some answers already is gone on with."""
    results = Results(args.work or Path(args.out).with_suffix(".runs"))
    decoding = Decoding()
    runner = Runner(
        model.model,
        model.processor,
        choices,
        results,
        limits=token_limits(model.processor, loaded.benchmark.max_new_tokens),
        decoding=decoding,
        reading=reading,
        context_limit=model.context_limit,
    )
    with blaming_input(ResultsError, ValueError, TypeError, OSError), notes_from_warnings():
        settings = run_settings(args, loaded, model, decoding, reading)
        with results.at_work({**settings, "chosen": [item.id for item in items]}, loaded.items):
            results.record_selection(items)
            runner.run(items, batch_size=args.batch_size)
    return results


def _score(depth: int, table: Any, choice: Choice) -> DepthScore:
    accuracy = table.rows[ALL][choice.name].accuracy
    return DepthScore(depth, accuracy.value, accuracy.standard_error)


def _print(estimates: dict[int, AlphaEstimate], scores: list[DepthScore], accuracies: Any, depth: int) -> None:
    rests_on = next(iter(estimates.values()))
    table = rich.table.Table(
        title=f"alpha on {rests_on.num_prompts} prompts about {rests_on.num_clusters} videos, with 95 % intervals",
        title_justify="left",
    )
    for name in ("fork layers", "alpha, video", "alpha, audio", "accuracy", ""):
        table.add_column(name, justify="right")
    by_depth = {score.fork_layers: score for score in scores}
    for layers, estimate in estimates.items():
        alphas = [
            f"{estimate.alpha[m]:.3f} ({estimate.low[m]:.3f} to {estimate.high[m]:.3f})" for m in ("visual", "audio")
        ]
        score = by_depth.get(layers)
        right = "" if score is None else f"{score.accuracy:.1%} ± {score.standard_error:.1%}"
        table.add_row(str(layers), *alphas, right, "chosen" if layers == depth else "")
    if accuracies is not None:
        vanilla = accuracies.rows[ALL]["vanilla"].accuracy
        table.add_row("vanilla", "", "", f"{vanilla.value:.1%} ± {vanilla.standard_error:.1%}", "")
    Console(width=110).print(table)


def _plot(
    folder: Path,
    readings: list[PromptReading],
    depth: int,
    table: Any,
    methods: dict[int, str],
) -> None:
    from fmd_ext.lab.diagnose import plots
    from fmd_ext.lab.eval.curves import SETTINGS, lines_of

    alphas = np.array([list(reading.alpha(depth).values()) for reading in readings])
    print(f"plot: {plots.alpha_reliability(alphas, folder / 'alpha.png')}")
    if table is not None:
        label = SETTINGS["fork_layers"]
        lines = {label: lines_of(table, methods)}
        print(f"plot: {plots.curves(lines, folder / 'fork_depth.png', chosen={label: depth})}")
