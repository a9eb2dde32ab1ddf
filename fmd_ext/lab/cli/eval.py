"""``fmd-ext eval``: a benchmark by several decoding methods, scored and compared."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import fmd_ext
from fmd_ext.cli import show
from fmd_ext.cli.answer import config_from
from fmd_ext.cli.ask import DEFAULT_RATES, SMALLEST_FRAME
from fmd_ext.cli.errors import UserError, blaming_input, notes_from_warnings
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import FMDConfig
from fmd_ext.hardware import cpu_model
from fmd_ext.lab.cli.questions import choose, ids_of, load_questions, refuse_malformed, usable
from fmd_ext.lab.cli.scores import console, show_evaluation, show_speed
from fmd_ext.lab.eval.benchmarks import BENCHMARKS, DataError, Loaded, unreadable
from fmd_ext.lab.eval.clips import Reading
from fmd_ext.lab.eval.elsewhere import read_answers, take_in
from fmd_ext.lab.eval.exports import export, export_questions
from fmd_ext.lab.eval.generation import Decoding, checkpoint_settings, settings_in_force, token_limits
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.methods import METHODS, Choice, parse_methods
from fmd_ext.lab.eval.predictions import Results, ResultsError
from fmd_ext.lab.eval.results_file import fingerprint, write_results
from fmd_ext.lab.eval.run import DeviceLost, Runner, rank_and_size
from fmd_ext.lab.eval.scores import evaluate, write_scores
from fmd_ext.lab.eval.speed import measure, read_speed, write_speed
from fmd_ext.lab.eval.statistics import require_scipy
from fmd_ext.ops import dispatch


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list()
    with blaming_input(ImportError):
        require_scipy()
    if args.score_only:
        if args.output is None:
            raise UserError("--score-only needs the results folder: --output FOLDER")
        return _score(args, Results(args.output))
    if args.benchmark is None or args.data is None:
        raise UserError("--benchmark and --data say what to ask (or --score-only, --list)")
    loaded = load_questions(args)
    items, calibration = choose(args, loaded)
    with blaming_input(ValueError, OSError):
        choices = [choice.with_defaults(_given(config_from(args))) for choice in parse_methods(args.method)]
        decoding = Decoding(
            args.temperature, args.top_p, args.samples, args.seed, args.max_new_tokens, args.generation_config
        )
        rank, size = rank_and_size()
    if rank == 0:
        print("\n".join(loaded.report()))
    if args.check:
        return _check(args, loaded, items)
    if args.predictions:
        return _take_in(args, loaded, items)
    return _answer(args, loaded, usable(args, loaded, items), calibration, choices, decoding, rank, size)


def _check(args: argparse.Namespace, loaded: Loaded, items: list[Item]) -> int:
    if args.export:
        with blaming_input(OSError):
            print(f"questions: {export_questions(loaded, items, args.export)}")
    broken = unreadable(items, progress=True)
    if broken:
        print("\n".join([f"{len(broken)} files that cannot be opened:", *(f"  {line}" for line in broken)]))
    return 1 if loaded.missing or loaded.malformed or broken else 0


def _take_in(args: argparse.Namespace, loaded: Loaded, items: list[Item]) -> int:
    """Scores answers made elsewhere: no model, and no videos."""
    refuse_malformed(args, loaded)
    results = Results(args.output or Path("results") / f"{loaded.benchmark.name}-elsewhere")
    files = dict(args.predictions)
    with blaming_input(DataError, ResultsError, OSError):
        answers = {name: read_answers(path, loaded.items) for name, path in files.items()}
        take_in(results, loaded, items, answers, files)
    return _score(args, results)


def _answer(
    args: argparse.Namespace,
    loaded: Loaded,
    items: list[Item],
    calibration: Mapping[str, Any],
    choices: list[Choice],
    decoding: Decoding,
    rank: int,
    size: int,
) -> int:
    model = load_model(args.model, args.dtype, _device(args.device, size))
    if rank == 0:
        _tell_about(model, decoding)
    choices = [choice.with_defaults(_given(model.settings)) for choice in choices]
    reading = reading_from(args)
    name = re.sub(r"[^\w.-]+", "-", Path(args.model).name if args.model else "built-in")
    results = Results(args.output or Path("results") / f"{loaded.benchmark.name}-{name}")
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
    with blaming_input(ResultsError, ValueError, TypeError, OSError), _going_on(), notes_from_warnings():
        in_force = {}
        for choice in choices:  # a setting out of range is found before the first question
            with choice.applied(model.model, model.processor) as settings:
                in_force[choice.name] = settings
        with results.at_work(run_settings(args, loaded, model, decoding, reading), loaded.items, in_force):
            if rank == 0:
                results.record_selection(items, ids_of(args.exclude), calibration)
            runner.run(
                items,
                batch_size=args.batch_size,
                rank=rank,
                size=size,
                progress=not args.quiet,
                retry_failed=args.retry_failed,
            )
    if rank != 0:
        return 0
    failed = {p.item for p in results.predictions().values() if p.error is not None} & {item.id for item in items}
    timed = [item for item in items if item.id not in failed][: args.speed or 0]
    if timed:
        with blaming_input(ValueError, OSError), notes_from_warnings():
            write_speed(results, measure(runner, timed))
    _score(args, results)
    if failed:
        show.note(f"{len(failed)} questions failed, their reasons are above; --retry-failed asks them again")
    return 1 if failed else 0


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """A lost device is no fault of the input, and the run is not lost."""
    try:
        yield
    except DeviceLost as error:
        raise UserError(f"{error}; the same command in a new process goes on behind this question") from error


def _tell_about(model: LoadedModel, decoding: Decoding) -> None:
    if model.is_random:
        show.note("this model's weights are random: its answers mean nothing")
    own = checkpoint_settings(model.model)
    if own and decoding.generation_config == "neutral":
        listed = ", ".join(f"{name}={value}" for name, value in own.items())
        show.note(
            f"the checkpoint's generation_config has no effect here: {listed} (--generation-config model: it has)"
        )


def _score(args: argparse.Namespace, results: Results) -> int:
    with blaming_input(ResultsError, DataError, OSError):
        evaluation = evaluate(results, baseline=args.baseline, protocol=args.protocol)
        write_scores(results, evaluation)
        sent = write_results(results)
    show_evaluation(console(), evaluation)
    if speed := read_speed(results):
        show_speed(console(), speed)
    if args.report:
        from fmd_ext.lab.eval.report import write_report

        with blaming_input(ImportError, OSError):
            path = write_report(results, evaluation, args.report)
        print(f"report: {path}")
    if args.export:
        with blaming_input(OSError):
            paths = export(results, evaluation, args.export)
        print(f"exported: {len(paths)} files in {args.export}")
    print(f"results: {results.folder}; to send to others: {sent}")
    return 0


def reading_from(args: argparse.Namespace) -> Reading:
    """How clips are read, as the command line says."""
    pixels = args.max_frame_pixels
    return Reading(
        fps=args.fps or DEFAULT_RATES["fps"],
        max_frames=args.max_frames or DEFAULT_RATES["max_frames"],
        frame_pixels=None if pixels is None else (min(pixels, SMALLEST_FRAME), pixels),
        interleaved=args.interleaved,
    )


def run_settings(
    args: argparse.Namespace, loaded: Loaded, model: LoadedModel, decoding: Decoding, reading: Reading
) -> dict[str, Any]:
    """All that decides the predictions; what only helps to understand them is under ``about``."""
    packages = ("torch", "transformers", "av", "numpy")
    versions = {"fmd-ext": fmd_ext.__version__, **{name: importlib.metadata.version(name) for name in packages}}
    gpu = torch.cuda.get_device_name(model.model.device) if model.model.device.type == "cuda" else None
    return {
        "benchmark": loaded.benchmark.name,
        "questions": loaded.digest,
        "prompt": loaded.prompt.template,
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "decoding": vars(decoding),
        "generation": settings_in_force(model.model, decoding),
        "max_new_tokens": token_limits(model.processor, loaded.benchmark.max_new_tokens),
        "reading": vars(reading),
        "batch_size": args.batch_size,
        "decode_split": "fixed" if dispatch.splits_are_fixed() else "auto",
        "about": {
            "prompt_source": loaded.prompt.source,
            "files": [str(path) for path in loaded.files],
            "model_type": model.model.config.model_type,
            "model_revision": getattr(model.model.config, "_commit_hash", None),
            "model_fingerprint": fingerprint(model.model),
            "random_weights": model.is_random,
            "checkpoint_generation_config": checkpoint_settings(model.model),
            "questions": {
                "found": len(loaded.items),
                "doubled": len(loaded.doubled),
                "published": loaded.count_report(),
            },
            "excluded": {"malformed": len(loaded.malformed), "missing_videos": len(loaded.missing)},
            "versions": {"python": platform.python_version(), **versions},
            "device": model.model.device.type,
            "machine": gpu or cpu_model(),
        },
    }


def _given(config: FMDConfig) -> dict[str, Any]:
    """Settings given as options, or by the model, go to every method that takes them and does not say otherwise."""
    return {name: value for name, value in vars(config).items() if value is not None}


def _device(device: str, size: int) -> str:
    """Each of several processes takes a GPU of its own, unless one is named."""
    if device == "auto" and size > 1 and torch.cuda.device_count() > 1:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return device


def _list() -> int:
    print("benchmarks:")
    for benchmark in BENCHMARKS.values():
        print(f"  {benchmark.name:14} {benchmark.title}; prompts: {', '.join(benchmark.prompts)}")
        print(f"  {'':14} {benchmark.source}")
    print("methods:")
    for method in METHODS.values():
        print(f"  {method.name:14} {method.summary}")
        print(f"  {'':14} {method.source}")
        print(f"  {'':14} {method.passes}")
        for name, meaning in method.settings.items():
            print(f"  {'':14}   {name}: {meaning}")
    return 0
