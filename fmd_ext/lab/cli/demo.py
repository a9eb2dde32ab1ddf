"""``fmd-ext demo``: the method at work without a download, on a bundled clip and on one that is made on the spot."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fmd_ext.cli import show
from fmd_ext.cli.answer import Answer, check_context, config_from, generate, patched
from fmd_ext.cli.errors import UserError, blaming_input, check_target, notes_from_warnings
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import FMDConfig
from fmd_ext.inputs.chat import prepare_inputs
from fmd_ext.inputs.media import Clip, load_clip
from fmd_ext.lab import trained
from fmd_ext.lab.cli.diagnose import plain
from fmd_ext.lab.synthetic import SPLITS, Question, Scene, scene_of, write_scene
from fmd_ext.lab.synthetic.questions import audio_question, caption_question, listing, matching_question, video_question

ROUNDS = 3
VANILLA, FORKED, ROUTED = METHODS = ("vanilla", "FMD", "FMD routed")
# (question, what is true or None, what each method says)
Asked = tuple[str, str | None, tuple[str, ...]]


def run(args: argparse.Namespace) -> int:
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty")
    check_target(args.picture)
    loaded = load_model(None, device="cpu")
    configs = _configs(args, loaded)
    console = Console()
    _line(console, f"model: {loaded.name}, {loaded.model.num_parameters() / 1e6:.1f} M parameters")
    for name, config in zip(METHODS[1:], configs, strict=True):
        with patched(loaded, config) as handle:
            layers = loaded.model.config.get_text_config().num_hidden_layers
            _line(console, f"{name}: {show.describe(handle.config, layers)}")

    clips = _clips(args)
    asked: list[Asked] = []
    for title, clip, scene in clips:
        what = f"shows {listing(scene.visible)}, sounds like {listing(scene.heard)} ({scene.relation})"
        _line(console, f"\n{title}: {what}")
        here = [_ask(loaded, configs, args, clip, question) for question in _questions(args, scene)]
        show.answers(console, ("question", "true", *METHODS), [_marked(*row) for row in here])
        asked += here
        last = clip, here
    known = [(right, said) for _, right, said in asked if right is not None]
    if known:
        counts = (sum(plain(said[i]) == plain(right) for right, said in known) for i in range(len(METHODS)))
        _line(console, f"right: {', '.join(f'{n} {c} of {len(known)}' for n, c in zip(METHODS, counts, strict=True))}")
        console.print(f"{evidence()}\n", highlight=False, markup=False)
    _time(console, loaded, configs, args, *last)
    if args.picture:
        from fmd_ext.lab.cli.demo_picture import draw

        title, clip, scene = clips[0]
        rows = [_marked(*row) for row in asked[: len(_questions(args, scene))]]
        with blaming_input(OSError, ImportError):
            print(f"picture: {draw(args.picture, title, clip, ('question', 'true', *METHODS), rows)}")
    return 0


def evidence() -> str:
    """What these few questions are part of: the figures of docs/evidence.md, as they are kept beside the model."""
    found = json.loads(trained.FIGURES.read_text())
    told = "; ".join(f"{name} {sound} and {picture} %" for name, (sound, picture) in found["disagreeing"].items())
    return (
        f"These are few questions. Over {found['clips']} test clips (docs/evidence.md, settings chosen there), where "
        f"sound and picture disagree, questions about the sound and about the picture are right: {told}."
    )


def _configs(args: argparse.Namespace, loaded: LoadedModel) -> tuple[FMDConfig, FMDConfig]:
    """Of FMD and of FMD routed: the model's own settings, where the command line says nothing else."""
    given = config_from(args)
    routed = FMDConfig.from_file(trained.ROUTED)
    names = [field.name for field in dataclasses.fields(given)]
    own = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    with blaming_input(ValueError, TypeError):
        return given, routed.replace(**{name: v for name, v in own.items() if name != "text_weight" or given.asks})


def _clips(args: argparse.Namespace) -> list[tuple[str, Clip, Scene]]:
    """A bundled clip in which picture and sound disagree, and one made on the spot: title, clip, what is in it."""
    path, bundled = next((p, scene) for p, scene in trained.bundled_scenes().items() if scene.relation == "swapped")
    seed = secrets.randbelow(1_000_000) if args.seed is None else args.seed
    # Behind the bundled clips, so that it is never one of them.
    fresh = scene_of(SPLITS["demo"].start + len(trained.bundled_scenes()) + seed % 999_000)
    with tempfile.TemporaryDirectory(prefix="fmd_ext_") as folder:
        made = load_clip(write_scene(Path(folder) / "demo.mp4", fresh))
    return [
        (f"bundled clip {path.name}", load_clip(path), bundled),
        (f"clip made on the spot (--seed {seed})", made, fresh),
    ]


def _questions(args: argparse.Namespace, scene: Scene) -> Sequence[tuple[str, str | None]]:
    """The one that was given, else what misleads: of each sense, about what only the other one perceives."""
    if args.question is not None:
        return [(args.question, None)]
    asked: list[Question] = []
    for kind in dict.fromkeys((*scene.visible, *scene.heard)):
        asked += [audio_question(scene, kind), video_question(scene, kind)]
    return [question.asked() for question in (*asked, matching_question(scene), caption_question(scene))]


def _ask(
    loaded: LoadedModel,
    configs: Sequence[FMDConfig],
    args: argparse.Namespace,
    clip: Clip,
    question: tuple[str, str | None],
) -> Asked:
    prompt, true = question
    inputs = _inputs(loaded, args, clip, prompt)
    said = [generate(loaded, inputs, args.max_new_tokens).text]
    for config in configs:
        with patched(loaded, config):
            said.append(generate(loaded, inputs, args.max_new_tokens).text)
    return prompt, true, tuple(said)


def _inputs(loaded: LoadedModel, args: argparse.Namespace, clip: Clip, prompt: str) -> dict[str, Any]:
    with notes_from_warnings(), blaming_input(ValueError):
        inputs = prepare_inputs(loaded.processor, clip, prompt, use_audio_in_video=args.interleaved)
    check_context(loaded, inputs, args.max_new_tokens)
    return inputs


def _marked(prompt: str, true: str | None, said: Sequence[str]) -> tuple[str, ...]:
    """A row of the table; answers that are wrong are marked."""
    if true is None:
        return prompt, "", *said
    return prompt, true, *(text if plain(text) == plain(true) else f"{text} (wrong)" for text in said)


def _time(
    console: Console,
    loaded: LoadedModel,
    configs: Sequence[FMDConfig],
    args: argparse.Namespace,
    clip: Clip,
    asked: Sequence[Asked],
) -> None:
    """How long the last answer takes. In turn, so that a machine that is busy for a while is busy for all."""
    inputs = _inputs(loaded, args, clip, asked[-1][0])
    runs: dict[str, list[Answer]] = {name: [] for name in METHODS}
    for _ in range(ROUNDS):
        runs[VANILLA].append(generate(loaded, inputs, args.max_new_tokens, exactly=True))
        for name, config in zip(METHODS[1:], configs, strict=True):
            with patched(loaded, config):
                runs[name].append(generate(loaded, inputs, args.max_new_tokens, exactly=True))
    how = f"median of {ROUNDS} runs; {ROUTED} asks first"
    show.timings(console, {name: median(repeats) for name, repeats in runs.items()}, how)


def median(repeats: list[Answer]) -> Answer:
    """The same answer with the median of the timings."""
    rates = [answer.tokens_per_s for answer in repeats if answer.tokens_per_s is not None]
    return dataclasses.replace(
        repeats[0],
        first_token_s=statistics.median(answer.first_token_s for answer in repeats),
        tokens_per_s=statistics.median(rates) if rates else None,
    )


def _line(console: Console, text: str) -> None:
    """One line as it is: not wrapped, not coloured, no markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
