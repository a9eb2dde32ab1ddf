"""``fmd-ext ask``: one question about one clip."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from rich.console import Console

from fmd_ext.cli import show
from fmd_ext.cli.answer import Answer, check_context, config_from, generate, patched
from fmd_ext.cli.errors import UserError, blaming_input, notes_from_warnings
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.inputs.chat import SMALLEST_FRAME, load_clip_for, prepare_inputs, to_device
from fmd_ext.inputs.media import Clip, MediaError, check_clip

DEFAULT_RATES = {"fps": 2.0, "max_frames": 128}


def run(args: argparse.Namespace) -> int:
    if not args.question.strip():
        raise UserError("the question is empty")
    config = config_from(args)
    with blaming_clip():
        check_clip(args.clip)  # before the model is loaded, which takes a while
    loaded = load_model(args.model, args.dtype, args.device)
    clip = read_clip(args, loaded.processor)
    if loaded.is_random:
        show.note("this model's weights are random: its words mean nothing")
    inputs = inputs_for(loaded, clip, args)
    check_context(loaded, inputs, args.max_new_tokens)
    if args.vanilla:
        generate(loaded, inputs, args.max_new_tokens, stream_to=sys.stdout)
        return 0
    if clip.missing:
        show.note(f"the clip has no {clip.missing}, so nothing is forked: the answer is the model's own")

    answers: dict[str, Answer] = {}
    if args.compare:
        answers["vanilla"] = generate(loaded, inputs, args.max_new_tokens)
    with patched(loaded, config) as settings:
        if not settings.fork_layers:
            show.note("nothing is forked with --fork-layers 0: the answer is the model's own")
        stream_to = None if args.compare else sys.stdout
        answers["fork-merge decoding"] = generate(loaded, inputs, args.max_new_tokens, stream_to=stream_to)
    if args.compare:
        console = Console()
        num_layers = loaded.model.config.get_text_config().num_hidden_layers
        print(f"fork-merge decoding: {show.describe(settings, num_layers)}")
        show.side_by_side(console, answers)
        show.timings(console, answers, "one run each")
    return 0


def read_clip(args: argparse.Namespace, processor: Any) -> Clip:
    given = {"fps": args.fps, "max_frames": args.max_frames}
    own = getattr(processor, "clip_arguments", {})
    if any(given.values()) and own.get("num_frames"):
        show.note(f"the model takes {own['num_frames']} frames of any clip: --fps and --max-frames have no effect")
    if any(given.values()) and own.get("edge_seconds"):
        show.note("the model takes the first and the last frame of each second: --fps and --max-frames have no effect")
    if any(given.values()) and own.get("pick"):
        show.note("the model picks frames by a rule of its own: --fps and --max-frames have no effect")
    rates = {name: value or DEFAULT_RATES[name] for name, value in given.items()}
    with blaming_clip():
        return load_clip_for(processor, args.clip, **rates)


def blaming_clip() -> contextlib.AbstractContextManager[None]:
    return blaming_input(MediaError, FileNotFoundError, IsADirectoryError, PermissionError)


def inputs_for(loaded: LoadedModel, clip: Clip, args: argparse.Namespace) -> dict[str, Any]:
    pixels = args.max_frame_pixels
    frame_pixels = None if pixels is None else (min(pixels, SMALLEST_FRAME), pixels)
    with notes_from_warnings(), blaming_input(ValueError):
        inputs = prepare_inputs(
            loaded.processor, clip, args.question, use_audio_in_video=args.interleaved, frame_pixels=frame_pixels
        )
    return to_device(inputs, loaded.model.device)
