"""A self-contained HTML report of an evaluation: tables, plots, and the answers that flip, with frames and sound."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

import fmd_ext
from fmd_ext.inputs.media import Clip, load_clip
from fmd_ext.lab.eval.benchmarks import BENCHMARKS
from fmd_ext.lab.eval.clips import clip_of, reason_of
from fmd_ext.lab.eval.figures import accuracy_figure, difference_figure
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Key, Prediction, Results, write_atomically
from fmd_ext.lab.eval.report_template import PAGE
from fmd_ext.lab.eval.run import judged
from fmd_ext.lab.eval.scores import ALL, GAINS, Evaluation, reading_of
from fmd_ext.lab.eval.speed import read_speed
from fmd_ext.lab.eval.tables import Table
from fmd_ext.lab.eval.wording import (
    against,
    caption_against,
    caption_score,
    passes_of,
    percent,
    ratio,
    reading_lines,
    short_names,
)

EXAMPLES = 4  # per method and direction
FRAMES = 4  # per example
WAVE_SIZE = (560, 56)  # pixels


def write_report(results: Results, evaluation: Evaluation, path: str | Path) -> Path:
    """Writes the report and returns its path.

    Clips of the shown examples are read again; one that is gone is named instead. Raises ImportError where matplotlib
    is missing, naming the extra.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(results, evaluation))
    return path


def render(results: Results, evaluation: Evaluation) -> str:
    """The page as text."""
    settings, names = evaluation.settings, short_names(evaluation.methods)
    benchmark = BENCHMARKS[settings["benchmark"]]
    title = f"{benchmark.title}: {', '.join(names.values())}"
    in_force = results.methods()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE).render(
        title=title,
        model=settings.get("model", "unknown model"),
        version=fmd_ext.__version__,
        random=settings.get("about", {}).get("random_weights", False),
        evaluation=evaluation,
        baseline=names[evaluation.baseline],
        readings=reading_lines(evaluation, names),
        legend=[(name, method, _listed(in_force.get(method, {})), passes_of(method)) for method, name in names.items()],
        notes=[(kind, [by_method[method] for method in names]) for kind, by_method in evaluation.counts.notes.items()],
        names=list(names.values()),
        tables=[_table(evaluation, table, names) for table in evaluation.tables],
        averages=[(c, names[m], percent(e)) for c, row in evaluation.averages.items() for m, e in row.items()],
        yes_no=_yes_no(evaluation, names),
        yes_no_names=("", "method", "precision, %", "recall, %", "F1, %", '"yes", %'),
        gains=[f"{100 * gain:g}" for gain in GAINS],
        power=_power(evaluation, names),
        captions=_captions(evaluation, names),
        speed=_speed(read_speed(results)),
        run_speed=[
            (
                names[method],
                f"{1000 * row['first_token_s']:.0f} ms",
                f"{row['first_token_ratio']:.2f}",
                f"{row['seconds_per_answer']:.2f}",
                f"{row['tokens_per_answer']:.1f}",
            )
            for method, row in evaluation.speed.items()
        ],
        examples=_examples(results, evaluation, names),
        settings=json.dumps({**settings, "methods": in_force}, indent=2, ensure_ascii=False),
    )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()) or "none"


def _table(evaluation: Evaluation, table: Table, names: dict[str, str]) -> dict[str, Any]:
    figures = []
    if table.category != ALL:
        figures = [accuracy_figure(evaluation, table)]
        if len(evaluation.methods) > 1:
            figures.append(difference_figure(evaluation, table))
    rows = [
        {
            "first": method == evaluation.baseline,
            "group": group if method == evaluation.baseline else "",
            "num_items": cell.accuracy.num_items if method == evaluation.baseline else "",
            "videos": cell.accuracy.num_clusters if method == evaluation.baseline else "",
            "method": names[method],
            "accuracy": percent(cell.accuracy),
            "against": against(cell),
            "unparsed": f"{100 * cell.unparsed:.1f}",
        }
        for group, cells in table.rows.items()
        for method, cell in cells.items()
    ]
    title = "All questions" if table.category == ALL else f"By {table.category}"
    return {"title": title, "rows": rows, "figures": [Markup(figure) for figure in figures]}


def _yes_no(evaluation: Evaluation, names: dict[str, str]) -> list[tuple[str, ...]]:
    metrics = ("precision", "recall", "f1", "yes_rate")
    return [
        (
            group if method == evaluation.baseline else "",
            names[method],
            *(percent(cell.yes_no[name]) for name in metrics),
        )
        for table in evaluation.tables
        for group, cells in table.rows.items()
        for method, cell in cells.items()
        if cell.yes_no
    ]


def _power(evaluation: Evaluation, names: dict[str, str]) -> list[tuple[str, ...]]:
    rows = []
    for method, needed in evaluation.items_needed.items():
        detectable = evaluation.detectable[method]
        shown = f"{100 * detectable:.1f} points" if math.isfinite(detectable) else "–"
        rows.append((names[method], shown, *("–" if count is None else f"{count:,}" for count in needed.values())))
    return rows


def _captions(evaluation: Evaluation, names: dict[str, str]) -> list[tuple[str, str, str, str]]:
    rows = []
    for method, found in evaluation.captions.items():
        if isinstance(found, str):
            rows.append((names[method], "", found, ""))
        else:
            rows += [(names[method], m, caption_score(cell), caption_against(cell)) for m, cell in found.items()]
    return rows


def _speed(speed: dict[str, Any] | None) -> dict[str, Any] | None:
    if speed is None:
        return None
    names = short_names(list(speed["methods"]))
    rows = [
        (
            names[method],
            f"{1000 * row['first_token_s']:.0f} ms",
            ratio(row["first_token_ratio"]),
            f"{row['tokens_per_s']:.1f}",
            ratio(row["tokens_per_s_ratio"]),
            "not measured on a CPU" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB",
        )
        for method, row in speed["methods"].items()
    ]
    numbers = {"num_items": speed["items"], "tokens": speed["tokens"], "prompt_tokens": round(speed["prompt_tokens"])}
    return numbers | {"rows": rows}


def _examples(results: Results, evaluation: Evaluation, names: dict[str, str]) -> list[dict[str, Any]]:
    items = {item.id: item for item in results.items()}
    predictions = results.predictions()
    reading = evaluation.settings.get("reading", {})
    read, _ = reading_of(BENCHMARKS[evaluation.settings["benchmark"]], evaluation.protocol)
    shown = []
    for method, flips in evaluation.flips.items():
        chosen = [("gained", identity) for identity in _spread(flips["gained"])]
        chosen += [("lost", identity) for identity in _spread(flips["lost"])]
        shown.append(
            {
                "name": names[method],
                "gained": len(flips["gained"]),
                "lost": len(flips["lost"]),
                "shown": [
                    _example(items[identity], verdict, (evaluation.baseline, method), predictions, names, reading, read)
                    for verdict, identity in chosen
                ],
            }
        )
    return [method for method in shown if method["shown"]]


def _spread(identities: list[str]) -> list[str]:
    """A few of them, from the whole range: not the first ones, which may be of one video."""
    count = min(EXAMPLES, len(identities))
    return [identities[index * len(identities) // count] for index in range(count)]


def _example(
    item: Item,
    verdict: str,
    methods: tuple[str, str],
    predictions: dict[Key, Prediction],
    names: dict[str, str],
    reading: dict[str, Any],
    read: Callable[[Item, str], str | None],
) -> dict[str, Any]:
    said = []
    for method in methods:
        raw = predictions[method, item.id, 0].raw
        parsed, score = judged(item, raw, read)
        said.append((names[method], f"{raw.strip()}\n→ {parsed or 'not parsed'}", bool(score)))
    example: dict[str, Any] = {
        "verdict": verdict,
        "id": item.id,
        "categories": [(name, ", ".join(item.values(name))) for name in item.categories],
        "prompt": predictions[methods[0], item.id, 0].prompt,
        "answer": item.answer,
        "said": said,
        "frames": [],
        "waveform": None,
        "note": None,
    }
    try:
        if item.path is None:
            raise FileNotFoundError(f"no file for the video {item.video}")
        fps = reading.get("fps", 2.0)
        clip = clip_of(item, lambda path: load_clip(path, fps=fps, max_frames=32, progress=False))
        wave = Markup(_waveform(clip)) if clip.audio is not None else None
        shown = example | {"frames": _frames(clip), "waveform": wave}
    except Exception as error:  # whatever is wrong with a clip, the tables are worth more
        return example | {"note": f"The clip cannot be shown: {reason_of(error)}"}
    return shown | ({"note": f"The clip has no {clip.missing}."} if clip.missing else {})


def _frames(clip: Clip) -> list[str]:
    """A few frames, spread over the clip, as data URLs."""
    if clip.frames is None:
        return []
    count = min(FRAMES, len(clip.frames))
    urls = []
    for index in (number * len(clip.frames) // count for number in range(count)):
        image = Image.fromarray(clip.frames[index])
        image.thumbnail((320, 240))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=80)
        urls.append("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode())
    return urls


def _waveform(clip: Clip) -> str:
    """The envelope of the sound: per pixel the least and the greatest sample. Full height is the loudest sample."""
    width, height = WAVE_SIZE
    columns = [part for part in np.array_split(clip.audio, width) if part.size]
    peak = float(np.abs(clip.audio).max())
    scale = height / 2 / max(peak, 1e-6)
    highs = [height / 2 - scale * float(part.max()) for part in columns]
    lows = [height / 2 - scale * float(part.min()) + 0.5 for part in columns]
    outline = [*enumerate(highs), *reversed(list(enumerate(lows)))]
    points = [f"{x},{y:.1f}" for x, y in outline]
    seconds = clip.audio.size / clip.sampling_rate
    return (
        f'<svg width="{width}" height="{height + 14}" viewBox="0 0 {width} {height + 14}" role="img" '
        f'aria-label="waveform of {seconds:.1f} seconds"><rect width="{width}" height="{height}" fill="#f3f3f3"/>'
        f'<polygon points="{" ".join(points)}" fill="#0072B2"/>'
        f'<text x="0" y="{height + 12}" font-size="11">0 s, peak {peak:.2f}</text>'
        f'<text x="{width}" y="{height + 12}" font-size="11" text-anchor="end">{seconds:.1f} s</text></svg>'
    )
