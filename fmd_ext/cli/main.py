"""Arguments of ``fmd-ext``, and what becomes of errors."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fmd_ext import __version__
from fmd_ext.cli.errors import UserError, notes_from_log
from fmd_ext.cli.extras import check_extras, uses_built_in_model

USER_ERROR, INTERRUPTED = 2, 130
TOY_MODEL = "the built-in toy model answers, trained on synthetic clips of eight kinds of objects"
LAB_COMMANDS = ("calibrate", "compare", "curves", "demo", "diagnose", "eval")  # their code lies in fmd_ext.lab.cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 (doctor found something wrong), 2 (wrong input) or 130 (Ctrl-C)."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if args.command == "serve":
        args.vllm = more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        if uses_built_in_model(args):
            print(f"note: {TOY_MODEL}; --model NAME takes another", file=sys.stderr)
        check_extras(args)
        # Only now: the commands import transformers, which takes seconds that --help does not need.
        command = importlib.import_module(f"fmd_ext.{'lab.' if args.command in LAB_COMMANDS else ''}cli.{args.command}")
        with notes_from_log():
            return command.run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"fmd-ext {args.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader of our output has had enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"fmd-ext {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fmd-ext", description="Fork-merge decoding for audio-visual language models.")
    parser.add_argument("--version", action="version", version=f"fmd_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    ask = commands.add_parser("ask", help="ask a model about a clip")
    ask.add_argument("clip", metavar="CLIP", help="video or audio file")
    ask.add_argument("question", metavar="QUESTION", help="what to ask")
    mode = ask.add_mutually_exclusive_group()
    mode.add_argument("--vanilla", action="store_true", help="the model as it is, without fork-merge decoding")
    mode.add_argument(
        "--compare", action="store_true", help="the model as it is and with fork-merge decoding, side by side"
    )
    _add_method(ask)
    _add_model(ask)
    _add_generation(ask, max_new_tokens=128)
    _add_reading(ask, one_clip=True)
    _add_debug(ask)

    demo = commands.add_parser("demo", help="show the method on the small built-in model, about clips it never saw")
    demo.add_argument("--question", help="what to ask about the clips instead of what misleads")
    demo.add_argument("--picture", metavar="FILE", help="draw the bundled clip and its answers there (png, svg or pdf)")
    demo.add_argument("--seed", type=_seed, help="of the clip made on the spot (a new one every time)")
    _add_method(demo)
    _add_generation(demo, max_new_tokens=32)
    _add_debug(demo)

    _add_eval(commands)
    _add_calibrate(commands)

    compare = commands.add_parser("compare", help="print the tables of results files, one's own or others'")
    compare.add_argument("results", nargs="+", metavar="FILE", help="a results.json that fmd-ext eval has written")
    _add_scoring(compare)
    _add_debug(compare)

    curves = commands.add_parser("curves", help="plot accuracy against alpha, fork depth and mask scale")
    curves.add_argument("results", metavar="FOLDER", help="results of fmd-ext eval with methods that differ in these")
    curves.add_argument("--category", metavar="NAME", help="a line for each of its values, such as task")
    curves.add_argument("--out", default="curves.png", metavar="FILE", help="png, svg or pdf (%(default)s)")
    curves.add_argument("--json", metavar="FILE", help="write the numbers there")
    _add_debug(curves)

    diagnose = commands.add_parser("diagnose", help="show where a question about a clip attends, layer by layer")
    diagnose.add_argument("clip", metavar="CLIP", help="video or audio file")
    diagnose.add_argument("question", metavar="QUESTION", help="what to ask")
    diagnose.add_argument("--plots", metavar="FOLDER", help="write a plot there (needs the extra 'plots')")
    diagnose.add_argument("--json", metavar="FILE", help="write all numbers there")
    _add_method(diagnose)
    _add_model(diagnose)
    _add_generation(diagnose, max_new_tokens=32)
    _add_reading(diagnose, one_clip=True)
    _add_debug(diagnose)

    doctor = commands.add_parser("doctor", help="say what is installed, which code the ops run, and what is wrong")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(doctor)

    serve = commands.add_parser(
        "serve",
        help="serve a model by vLLM, with fork-merge decoding",
        epilog="All other flags are those of `vllm serve`, which is printed and then run.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="folder or hub name, or built-in for a tiny one; comes first")
    serve.add_argument("--print-only", action="store_true", help="print the command, and do not run it")
    _add_method(serve)
    _add_debug(serve)

    verify = commands.add_parser("verify", help="hold a model, with its own weights, to two plain passes of itself")
    verify.add_argument("clip", metavar="CLIP", nargs="?", help="video with sound (default: one made on the spot)")
    verify.add_argument("--question", default="What can be seen and heard?", help="what to ask (%(default)r)")
    verify.add_argument("--fork-layers", type=_whole, metavar="N", help="decoder layers that run once per branch")
    _add_model(verify)
    _add_generation(verify, max_new_tokens=8)
    _add_reading(verify, one_clip=True)
    _add_debug(verify)
    return parser


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="evaluate decoding methods on a benchmark")
    what = parser.add_argument_group("what to ask")
    what.add_argument("--list", action="store_true", help="list benchmarks and methods, and stop")
    what.add_argument("--benchmark", metavar="NAME", help="such as avhbench; --list names all")
    what.add_argument("--data", metavar="FOLDER", help="with the published files and the videos")
    what.add_argument("--questions", metavar="FILE", help="the question file, where it has another name")
    what.add_argument("--check", action="store_true", help="say what is missing or cannot be opened, and stop")
    _add_allowances(what)
    what.add_argument(
        "--prompt", default="default", metavar="NAME", help="a prompt of the benchmark, or a template with {question}"
    )
    what.add_argument("--limit", type=_positive_int, metavar="N", help="ask N questions, spread over all")
    what.add_argument("--item", action="append", default=[], metavar="ID", help="ask this question; repeated, or @FILE")
    what.add_argument(
        "--exclude", action="append", default=[], metavar="ID", help="leave this question out; repeated, or @FILE"
    )
    what.add_argument(
        "--category", action="append", default=[], type=_name_value, metavar="NAME=VALUE", help="ask only about these"
    )
    what.add_argument(
        "--keep-calibration-videos",
        action="store_true",
        help="ask also about videos that --config was calibrated on, and say so in the report",
    )
    how = parser.add_argument_group("how to answer")
    how.add_argument(
        "--method",
        default="vanilla,fmd",
        metavar="NAMES",
        help="by commas, with settings by colons: vanilla,fmd-zero:fork_layers=7:alpha=0.9 (%(default)s)",
    )
    how.add_argument("--batch-size", type=_positive_int, default=1, metavar="N", help="questions at once (%(default)s)")
    how.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="above 0 samples (0: greedy)")
    how.add_argument("--top-p", type=_number, default=1.0, metavar="P", help="of the likeliest tokens (%(default)s)")
    how.add_argument("--samples", type=_positive_int, default=1, metavar="N", help="answers per question (%(default)s)")
    how.add_argument("--seed", type=_whole, default=0, help="of sampling (%(default)s)")
    how.add_argument(
        "--generation-config",
        choices=("neutral", "model"),
        default="neutral",
        help="whether the checkpoint's repetition penalty and the like have an effect (%(default)s: they have none)",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--output", metavar="FOLDER", help="resumed if it exists (results/BENCHMARK-MODEL)")
    out.add_argument("--retry-failed", action="store_true", help="ask again what failed before")
    out.add_argument("--score-only", action="store_true", help="score the folder again, without model and data")
    _add_scoring(out)
    out.add_argument("--report", metavar="FILE", help="also write a self-contained HTML report")
    out.add_argument(
        "--export",
        metavar="FOLDER",
        help="also write CSV and LaTeX tables, and the answers for official scorers and judge models; with --check the "
        "questions, to be answered elsewhere",
    )
    out.add_argument(
        "--predictions",
        action="append",
        default=[],
        type=_name_value,
        metavar="NAME=FILE",
        help="score answers made elsewhere (JSON lines of id and answer) under this name, without a model; repeated",
    )
    out.add_argument("--speed", type=_positive_int, metavar="N", help="also measure speed and memory on N questions")
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_method(parser)
    _add_model(parser)
    _add_generation(parser, max_new_tokens=None)
    _add_reading(parser)
    _add_debug(parser)


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser("calibrate", help="measure alpha, choose the fork depth, write both to a file")
    what = parser.add_argument_group("questions to calibrate on; fmd-ext eval --config leaves their videos out")
    what.add_argument("--benchmark", required=True, metavar="NAME", help="as for fmd-ext eval")
    what.add_argument("--data", required=True, metavar="FOLDER", help="with the published files and the videos")
    what.add_argument("--questions", metavar="FILE", help="the question file, where it has another name")
    what.add_argument("--prompt", default="default", metavar="NAME", help="a prompt of the benchmark, or a template")
    _add_allowances(what)
    what.add_argument(
        "--samples", type=_positive_int, default=100, metavar="N", help="prompts to measure alpha on (%(default)s)"
    )
    what.add_argument(
        "--validation",
        type=_count,
        default=200,
        metavar="N",
        help="questions about other videos, to choose the depth on (%(default)s)",
    )
    what.add_argument("--depths", type=_depths, metavar="N,N", help="fork depths to try (up to half of the layers)")
    what.add_argument(
        "--batch-size", type=_positive_int, default=1, metavar="N", help="questions at once (%(default)s)"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", default="fmd.json", metavar="FILE", help="the settings, for --config (%(default)s)")
    out.add_argument("--work", metavar="FOLDER", help="answers to the validation questions, resumed (OUT.runs)")
    out.add_argument("--plots", metavar="FOLDER", help="write plots there (needs the extra 'plots')")
    _add_method(parser)
    _add_model(parser)
    _add_layout(parser)
    _add_reading(parser)
    _add_debug(parser)


def _add_scoring(group: Any) -> None:
    group.add_argument(
        "--protocol",
        choices=("ours", "official"),
        default="ours",
        help="how answers are read: as a person does, or as the benchmark's own script (%(default)s)",
    )
    group.add_argument("--baseline", metavar="METHOD", help="the method to compare with (vanilla)")


def _add_allowances(group: Any) -> None:
    group.add_argument("--allow-missing", action="store_true", help="leave out questions whose video is missing")
    group.add_argument("--allow-malformed", action="store_true", help="leave out records that are not as published")


def _add_reading(parser: argparse.ArgumentParser, one_clip: bool = False) -> None:
    """``one_clip``: the command reads a clip that the user names, whose tracks they know."""
    group = parser.add_argument_group("reading the clip")
    if one_clip:
        group.add_argument(
            "--audio-track", type=_count, metavar="N", help="the sound track that is heard, from 0 (the first)"
        )
    group.add_argument(
        "--fps", type=_positive_float, metavar="N", help="frames per second shown to the model (2, or the model's)"
    )
    group.add_argument(
        "--max-frames", type=_positive_int, metavar="N", help="at most so many frames (128, or the model's)"
    )
    group.add_argument(
        "--max-frame-pixels",
        type=_positive_int,
        metavar="N",
        help="scale frames to at most so many pixels; fewer pixels, fewer tokens",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    """Settings of fork-merge decoding; one that is not given takes the model's default."""
    group = parser.add_argument_group("fork-merge decoding")
    group.add_argument("--config", metavar="FILE", help="settings that fmd-ext calibrate has written")
    group.add_argument(
        "--fork-layers", type=_layers, metavar="N", help="decoder layers that run once per branch: a number, or auto"
    )
    group.add_argument("--masking", choices=("zero", "attention"), help="how a branch loses the other modality")
    group.add_argument("--mask-scale", type=_number, metavar="S", help="factor on masked embeddings (zero masking)")
    group.add_argument("--alpha", type=_weight, metavar="A", help="merge weight: a number, visual=A,audio=B, or auto")
    group.add_argument(
        "--text-weight",
        type=_weight,
        metavar="W",
        help="weight of the visual branch at text positions: a number; auto, by what the question needs; or "
        "visual=W,audio=W for questions that need the one or the other",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="folder or hub name (default: a toy model, built in)")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(%(default)s)"
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ..., or spread: over all GPUs (%(default)s)"
    )


def _add_generation(parser: argparse.ArgumentParser, max_new_tokens: int | None) -> None:
    """``max_new_tokens``: the default; None leaves it to the question."""
    group = parser.add_argument_group("answer")
    told = "(by the kind of question)" if max_new_tokens is None else "(%(default)s)"
    group.add_argument("--max-new-tokens", type=_positive_int, default=max_new_tokens, metavar="N", help=told)
    _add_layout(group)


def _add_layout(group: Any) -> None:
    layout = group.add_mutually_exclusive_group()
    layout.add_argument(
        "--separate", dest="interleaved", action="store_false", help="first the picture, then the sound (default)"
    )
    layout.add_argument(
        "--interleaved", dest="interleaved", action="store_true", help="picture and sound in turn, as time goes by"
    )
    group.set_defaults(interleaved=False)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _positive_int(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def _depths(text: str) -> list[int]:
    return [_positive_int(part) for part in text.split(",")]


def _name_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 1_000_000:
        raise argparse.ArgumentTypeError(f"must be 0 to 999999, got {value}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _positive_float(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _layers(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto, got {text!r}") from None


def _weight(text: str) -> float | str | dict[str, float]:
    try:
        if text == "auto":
            return text
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number, visual=A,audio=B or auto, got {text!r}") from None
