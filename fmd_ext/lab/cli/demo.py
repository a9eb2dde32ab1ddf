"""``fmd-ext demo``: the method at work without a download, on a bundled clip and on one that is made on the spot."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fmd_ext.cli import show
from fmd_ext.cli.answer import Answer, check_context, config_from, generate, patched
from fmd_ext.cli.errors import UserError, blaming_input, notes_from_warnings
from fmd_ext.cli.models import LoadedModel, load_model
from fmd_ext.config import FMDConfig
from fmd_ext.inputs.chat import last_question_token, prepare_inputs
from fmd_ext.inputs.media import Clip, load_clip
from fmd_ext.lab.cli.attention import show_attention
from fmd_ext.lab.cli.diagnose import plain
from fmd_ext.lab.diagnose import attention_share
from fmd_ext.lab.synthetic import SPLITS, Question, Scene, scene_of, write_scene
from fmd_ext.lab.synthetic.questions import audio_question, caption_question, listing, matching_question, video_question
from fmd_ext.lab.trained import bundled_scenes

ROUNDS = 3
VANILLA, FORKED = "vanilla", "fork-merge decoding"
# What docs/evidence.md says of the settings in force here; a test holds it to the recorded data.
EVIDENCE = (
    "These are few questions. Over 1020 test clips (docs/evidence.md), with the settings that come with the model, "
    "fork-merge decoding is worse at questions about the sound, and no different, as far as can be seen, at those "
    "about the picture and about whether both match."
)


def run(args: argparse.Namespace) -> int:
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty")
    config = config_from(args)
    console = Console()
    loaded = load_model(None, device="cpu")
    text_line(console, f"model: {loaded.name}, {loaded.model.num_parameters() / 1e6:.1f} M parameters")
    with patched(loaded, config) as handle:
        settings = handle.config
        layers = loaded.model.config.get_text_config().num_hidden_layers
        text_line(console, f"{FORKED}: {show.describe(settings, layers)}\n")

    path, bundled = next((path, scene) for path, scene in bundled_scenes().items() if scene.relation == "swapped")
    title = f"bundled clip {path.name}"
    last, first_marks = _answer_all(console, loaded, config, args, title, load_clip(path), bundled)
    seed = secrets.randbelow(1_000_000) if args.seed is None else args.seed
    # Behind the bundled clips, so that it is never one of them.
    fresh = scene_of(SPLITS["demo"].start + len(bundled_scenes()) + seed % 999_000)
    with tempfile.TemporaryDirectory(prefix="fmd_ext_") as folder:
        clip = load_clip(write_scene(Path(folder) / "demo.mp4", fresh))
    title = f"clip made on the spot (--seed {seed})"
    last, more_marks = _answer_all(console, loaded, config, args, title, clip, fresh)
    marks = [*first_marks, *more_marks]
    if marks:
        counts = [
            f"{name} {sum(right)} of {len(marks)}"
            for name, right in zip((VANILLA, FORKED), zip(*marks, strict=True), strict=True)
        ]
        text_line(console, f"right: {', '.join(counts)}")
        console.print(f"{EVIDENCE}\n", highlight=False, markup=False)
    _measure(console, loaded, config, args, *last)
    return 0


def _answer_all(
    console: Console,
    loaded: LoadedModel,
    config: FMDConfig,
    args: argparse.Namespace,
    title: str,
    clip: Clip,
    scene: Scene,
) -> tuple[tuple[str, dict[str, Any]], list[tuple[bool, bool]]]:
    """Prints what is in the clip and the answers of both.

    Returns:
        The last question and its inputs; of each question whose answer is known, whether vanilla and forked are right.
    """
    text_line(
        console, f"{title}: shows {listing(scene.visible)}, sounds like {listing(scene.heard)} ({scene.relation})"
    )
    questions = _questions(scene) if args.question is None else [(args.question, None)]
    rows, marks, inputs = [], [], {}
    for prompt, expected in questions:
        with notes_from_warnings(), blaming_input(ValueError):
            inputs = prepare_inputs(loaded.processor, clip, prompt, use_audio_in_video=args.interleaved)
        check_context(loaded, inputs, args.max_new_tokens)
        said = [generate(loaded, inputs, args.max_new_tokens).text]
        with patched(loaded, config):
            said.append(generate(loaded, inputs, args.max_new_tokens).text)
        if expected is not None:
            right = [plain(text) == plain(expected) for text in said]
            said = [f"{text} ({'right' if fits else 'wrong'})" for text, fits in zip(said, right, strict=True)]
            marks.append(tuple(right))
        rows.append((prompt, expected or "", *said))
    show.answers(console, ("question", "true", VANILLA, FORKED), rows)
    return (prompt, inputs), marks


def _questions(scene: Scene) -> Sequence[tuple[str, str]]:
    """What misleads: of each sense, about what only the other one perceives, where there is something."""
    asked: list[Question] = []
    for kind in dict.fromkeys((*scene.visible, *scene.heard)):
        asked += [audio_question(scene, kind), video_question(scene, kind)]
    return [question.asked() for question in (*asked, matching_question(scene), caption_question(scene))]


def _measure(
    console: Console,
    loaded: LoadedModel,
    config: FMDConfig,
    args: argparse.Namespace,
    question: str,
    inputs: dict[str, Any],
) -> None:
    """Where the attention goes, and how long an answer takes."""
    token = last_question_token(loaded.processor, question)
    runs: dict[str, list[Answer]] = {VANILLA: [], FORKED: []}
    shares = {VANILLA: attention_share(loaded.model, inputs, token)}
    with patched(loaded, config) as handle:
        settings = handle.config
        shares[FORKED] = attention_share(loaded.model, inputs, token)
    # In turn, so that a machine that is busy for a while is busy for both.
    for _ in range(ROUNDS):
        runs[VANILLA].append(generate(loaded, inputs, args.max_new_tokens, exactly=True))
        with patched(loaded, config):
            runs[FORKED].append(generate(loaded, inputs, args.max_new_tokens, exactly=True))
    show_attention(console, shares)
    if settings.masking == "zero" and settings.fork_layers:
        text_line(console, "(zero masking: a branch still attends to the masked positions, which carry nothing)")
    show.timings(console, {name: median(repeats) for name, repeats in runs.items()}, f"median of {ROUNDS} runs")


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
