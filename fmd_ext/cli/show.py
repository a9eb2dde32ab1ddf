"""What is printed: tables for people, on stdout; notes on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmd_ext.config import AUTO, FMDConfig

if TYPE_CHECKING:
    from fmd_ext.cli.answer import Answer
    from fmd_ext.engine.routes import Routes
    from fmd_ext.inputs.media import Clip


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def described(clip: Clip) -> str:
    """What a model is shown and hears of a clip, in one line."""
    parts = []
    if clip.frames is not None:
        count = len(clip.frames)
        parts.append(f"{count} frame{'s' * (count > 1)}, {clip.fps:.2g} per second")
    if clip.audio is not None:
        parts.append(f"{len(clip.audio) / clip.sampling_rate:.1f} s of sound")
    return f"the clip gives {'; '.join(parts)}"


def cut_off(*answers: Answer) -> None:
    """Says so where an answer has no end."""
    longest = max((answer.num_tokens for answer in answers if not answer.is_whole), default=None)
    if longest is not None:
        note(f"cut off at {longest} tokens: --max-new-tokens takes more")


def describe(config: FMDConfig, num_layers: int) -> str:
    """The settings in force, in one line; those without effect are left out."""
    depth = "as many as the prompt asks for" if config.fork_layers == AUTO else config.fork_layers
    parts = [f"{depth} of {num_layers} layers forked", f"masking {config.masking}"]
    if config.masking == "zero":
        parts += [f"mask scale {config.mask_scale:g}", f"alpha {_weights(config.alpha)}"]
    weight = _weights(config.text_weight)
    if config.asks:
        weight = "by the question" + ("" if weight == AUTO else f" ({weight})")
    return ", ".join([*parts, f"text weight {weight}"])


def route(routes: Routes | None, config: FMDConfig) -> str:
    """What the first prompt's question was found to need, in one line; "" where nothing was asked."""
    if routes is None or routes.questions[0] is None:
        return ""
    from fmd_ext.engine.routes import NEEDS  # loaded: there are routes

    likely = ", ".join(f"{need} {value:.0%}" for need, value in zip(NEEDS, routes.probabilities[0], strict=True))
    then = f"text weight {routes.text_weights(config)[0]:.2f}" if routes.forks[0] else "both: nothing is forked"
    return f"the question needs: {likely}; {then}"


def side_by_side(console: Console, answers: dict[str, Answer]) -> None:
    table = Table(title="answers", title_justify="left", show_lines=True)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    # Text, not a string: an answer may hold what rich takes for markup.
    table.add_row(*(Text(answer.text) for answer in answers.values()))
    console.print(table)


def answers(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Several questions, one row each; the first column gets twice the room of the others."""
    table = Table(width=min(console.width, 120))
    for index, title in enumerate(titles):
        table.add_column(title, overflow="fold", ratio=1 if index else 2)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def timings(console: Console, answers: dict[str, Answer], how: str) -> None:
    """``how``: what the numbers are of, such as "one run each"."""
    table = Table(title=f"timings, {how}", title_justify="left")
    table.add_column("")
    table.add_column("first token", justify="right")
    table.add_column("tokens/s after it", justify="right")
    table.add_column("tokens", justify="right")
    for name, answer in answers.items():
        rate = "-" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}"
        table.add_row(name, f"{answer.first_token_s * 1000:.0f} ms", rate, str(answer.num_tokens))
    console.print(table)


def _weights(alpha: Any) -> str:
    if alpha == AUTO:
        return alpha
    return f"{alpha:g}" if isinstance(alpha, float) else ", ".join(f"{name} {value:g}" for name, value in alpha.items())
