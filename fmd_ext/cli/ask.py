"""``fmd-ext ask``: one question about one clip."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fmd_ext.cli import show
from fmd_ext.cli.answer import Answer, check_context, config_from, generate, patched
from fmd_ext.cli.errors import UserError, blaming_input, notes_from_warnings
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import FMDConfig
from fmd_ext.inputs.chat import SMALLEST_FRAME, load_clip_for, prepare_batch, to_device
from fmd_ext.inputs.media import Clip, MediaError, check_clip

DEFAULT_RATES = {"fps": 2.0, "max_frames": 128}


def run(args: argparse.Namespace) -> int:
    if not args.question.strip():
        raise UserError("the question is empty")
    config = config_from(args)
    with blaming_clip():
        check_clip(args.clip, args.audio_track)  # before the model is loaded, which takes a while
    loaded = load_model(args.model, args.dtype, args.device)
    check_settings(loaded, args, None if args.vanilla else config)
    clip = read_clip(args, loaded.processor)
    if loaded.is_random:
        show.note("this model's weights are random: its words mean nothing")
    inputs = inputs_for(loaded, [clip], args)
    check_context(loaded, inputs, args.max_new_tokens)
    if args.vanilla:
        show.cut_off(generate(loaded, inputs, args.max_new_tokens, stream_to=sys.stdout))
        return 0
    if clip.missing:
        show.note(f"the clip has no {clip.missing}, so nothing is forked: the answer is the model's own")

    answers: dict[str, Answer] = {}
    if args.compare:
        answers["vanilla"] = generate(loaded, inputs, args.max_new_tokens)
    with patched(loaded, config) as handle:
        settings = handle.config
        if not settings.fork_layers:
            show.note("nothing is forked with --fork-layers 0: the answer is the model's own")
        stream_to = None if args.compare else sys.stdout
        answers["fork-merge decoding"] = generate(loaded, inputs, args.max_new_tokens, stream_to=stream_to)
        if found := show.route(handle.last_routes, settings):
            show.note(found)
    if args.compare:
        console = Console()
        num_layers = loaded.model.config.get_text_config().num_hidden_layers
        print(f"fork-merge decoding: {show.describe(settings, num_layers)}")
        show.side_by_side(console, answers)
        show.timings(console, answers, "one run each")
    show.cut_off(*answers.values())
    return 0


def check_settings(loaded: LoadedModel, args: argparse.Namespace, config: FMDConfig | None) -> None:
    """Raises UserError for what the model refuses whatever the clip, before one is read.

    That is: settings out of range (``config``, None: not used), an option that the processor does not know, and a
    question and an answer that exceed the context by themselves.
    """
    if config is not None:
        with patched(loaded, config):
            pass
    check_context(loaded, inputs_for(loaded, [], args), args.max_new_tokens)


def read_clip(args: argparse.Namespace, processor: Any) -> Clip:
    """Reads the clip as the model wants it, and says what is shown and heard of it."""
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
        clip = load_clip_for(processor, args.clip, audio_track=args.audio_track, **rates)
    show.note(show.described(clip))
    return clip


def blaming_clip() -> contextlib.AbstractContextManager[None]:
    return blaming_input(MediaError, FileNotFoundError, IsADirectoryError, PermissionError)


def inputs_for(
    loaded: LoadedModel, clips: Sequence[Clip], args: argparse.Namespace, *, tell: bool = True
) -> dict[str, Any]:
    """The inputs of the question about each of the clips, or, without one, of the question alone.

    ``tell``: warnings become notes.
    """
    pixels = args.max_frame_pixels
    conversations = [([clip], args.question) for clip in clips] or [([], args.question)]
    with notes_from_warnings(tell), blaming_input(ValueError):
        inputs = prepare_batch(
            loaded.processor,
            conversations,
            use_audio_in_video=args.interleaved,
            frame_pixels=None if pixels is None else (min(pixels, SMALLEST_FRAME), pixels),
        )
    return to_device(inputs, loaded.model.device)
