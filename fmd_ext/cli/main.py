"""Arguments of ``fmd-ext``, and what becomes of errors."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fmd_ext.cli.errors import UserError, notes_from_log

USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 (doctor found something wrong), 2 (wrong input) or 130 (Ctrl-C)."""
    parser = _parser()
    args = parser.parse_args(argv)
    # Only now: the commands import transformers, which takes seconds that --help does not need.
    command = importlib.import_module(f"fmd_ext.cli.{args.command}")
    try:
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
    reading = ask.add_argument_group("reading the clip")
    reading.add_argument("--fps", type=_positive_float, help="frames per second shown to the model (2, or the model's)")
    reading.add_argument("--max-frames", type=_positive_int, help="at most so many frames (128, or the model's)")
    reading.add_argument(
        "--max-frame-pixels",
        type=_positive_int,
        help="scale frames to at most so many pixels; fewer pixels, fewer tokens",
    )
    _add_debug(ask)

    demo = commands.add_parser(
        "demo", help="show the method on a small random-weight model and a clip made on the spot"
    )
    demo.add_argument("--question", default="What can be seen and heard?", help="what to ask (%(default)r)")
    demo.add_argument("--seconds", type=_positive_float, default=4.0, help="length of the clip (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the model's weights and of the clip (%(default)s)")
    _add_method(demo)
    _add_generation(demo, max_new_tokens=32)
    _add_debug(demo)

    doctor = commands.add_parser("doctor", help="say what is installed, which code the ops run, and what is wrong")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(doctor)
    return parser


def _add_method(parser: argparse.ArgumentParser) -> None:
    """Settings of fork-merge decoding; one that is not given takes the model's default."""
    group = parser.add_argument_group("fork-merge decoding")
    group.add_argument("--config", metavar="FILE", help="settings that fmd-ext calibrate has written")
    group.add_argument(
        "--fork-layers", type=_layers, metavar="N", help="decoder layers that run once per branch: a number, or auto"
    )
    group.add_argument("--masking", choices=("zero", "attention"), help="how a branch loses the other modality")
    group.add_argument("--mask-scale", type=float, metavar="S", help="factor on masked embeddings (zero masking)")
    group.add_argument("--alpha", type=_alpha, metavar="A", help="merge weight: a number, visual=A,audio=B, or auto")
    group.add_argument("--text-weight", type=float, metavar="W", help="weight of the visual branch at text positions")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="NAME", help="folder or hub name (default: a tiny built-in one, random weights)"
    )
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(%(default)s)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (%(default)s)")


def _add_generation(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens", type=_positive_int, default=max_new_tokens, metavar="N", help="(%(default)s)"
    )
    layout = group.add_mutually_exclusive_group()
    layout.add_argument(
        "--separate", dest="interleaved", action="store_false", help="first the picture, then the sound (default)"
    )
    layout.add_argument(
        "--interleaved", dest="interleaved", action="store_true", help="picture and sound in turn, as time goes by"
    )
    parser.set_defaults(interleaved=False)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _layers(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto, got {text!r}") from None


def _alpha(text: str) -> float | str | dict[str, float]:
    try:
        if text == "auto":
            return text
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number, visual=A,audio=B or auto, got {text!r}") from None
