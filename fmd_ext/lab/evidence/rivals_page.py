"""The part of ``docs/evidence.md`` about routing and the rivals, from the recorded data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fmd_ext.lab.evidence.rivals import GROUPS, LEAST_LOSS, ROUTED

LEAST_GAIN = 0.10  # what routing is to gain where the senses disagree, each
MOST_TIME = 1.1  # of vanilla's
DROPPED = "drop a sense, by asking"
DISAGREEING = ("sound, disagreeing", "picture, disagreeing")
COMPARED = ("sound, agreeing", *DISAGREEING)


def rivals_lines(found: dict[str, Any]) -> Iterator[str]:
    """``found``: the whole record."""
    rivals, models, other = found["rivals"], found["models"], found["alternatives"]
    rows = {row["name"]: row for row in rivals["methods"]}
    yield from ("## Which sense the question needs", "")
    yield (
        'With `text_weight="auto"` the model is asked, text only, which modality a question needs '
        "([method.md](method.md#routing)). Training taught this model to answer that, as pretrained models can. "
        f"On the test questions it names the right one for {_router(rivals['router'])}."
    )
    yield ""
    sure = ", ".join(f"{group} {value:.1%}" for group, value in other["confidence"].items())
    yield (
        "Without asking, on validation clips: where the surer branch answers, all layers forked: "
        f"{sure}; where the unpatched model's last token looks tells questions about the picture from those about the "
        f"sound in {other['attention']['told_apart']:.0%} of {other['attention']['prompts']}, at the best threshold."
    )
    yield ""
    yield (
        f"Every method on the same {rivals['items']} questions about {rivals['clips']} test clips, each question a "
        "whole prompt. Settings were chosen on "
        f"{rivals['validation_clips']} validation clips: of those that lose no more than {LEAST_LOSS:.0%} against "
        "vanilla in any column, if there are such, the best by the mean over the six. Accuracy in %:"
    )
    yield ""
    yield from _table(
        ["", *GROUPS, "passes", "layer rows", "time"], (_method(row, rows["vanilla"]) for row in rows.values())
    )
    yield ""
    yield (
        "Passes (calls of the decoder), rows computed by its layers, and time are multiples of vanilla's, the asking "
        "included. Time is the median over rounds in which both run in turn. Chosen: " + _chosen(rows.values()) + "."
    )
    yield from ("", "Differences from vanilla in points, with 95 % intervals clustered by clip; `*`: p below 0.05 by a")
    yield f"sign-flip test, after Holm's correction over all {len(rivals['against_vanilla'])}:"
    yield ""
    names = list(dict.fromkeys(row["name"] for row in rivals["against_vanilla"]))
    yield from _table(["", *GROUPS], ([name, *_differences(rivals["against_vanilla"], name)] for name in names))
    yield from ("", f"{ROUTED} against MAD:", "")
    yield from _table(["", *GROUPS], [[f"{ROUTED} less MAD", *_differences(rivals["against_mad"], ROUTED)]])
    yield from (
        "",
        f"The goal was: {LEAST_GAIN:.0%} more than vanilla where the senses disagree, on sound and on picture,",
    )
    yield f"nowhere worse, in at most {MOST_TIME} of its time; no worse than MAD. {_verdict(rivals, rows)}"
    if models:
        clips = ", ".join(f"{model['name']}: {model['rivals']['clips']}" for model in models)
        yield ""
        yield "Other models, trained alike from other seeds, and one that was never asked what a question needs,"
        yield from (f"on fewer test clips ({clips}):", "")
        yield from _table(["", "method", *GROUPS, "asked rightly"], _other_models(rivals, models))
    yield ""


def _router(router: dict[str, Any]) -> str:
    return ", ".join(f"{cell['right']:.1%} of {cell['items']} that need {need}" for need, cell in router.items())


def _method(row: dict[str, Any], vanilla: dict[str, Any]) -> list[str]:
    cost = [row["cost"][key] / vanilla["cost"][key] for key in ("passes", "layer_rows")]
    return [row["name"], *_accuracies(row), *(f"{value:.2f}" for value in (*cost, row["time"]))]


def _accuracies(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row['groups'][group]['value']:.1f}" for group in GROUPS]


def _chosen(rows: Iterable[dict[str, Any]]) -> str:
    given = ((row["name"], row["settings"]) for row in rows if row["settings"])
    return "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in settings.items())}" for name, settings in given)


def _differences(rows: Sequence[dict[str, Any]], name: str) -> Iterator[str]:
    for row in rows:
        if row["name"] == name:
            star = " *" if row["p_adjusted"] < 0.05 else ""
            yield f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f}){star}"


def _verdict(rivals: dict[str, Any], rows: dict[str, Any]) -> str:
    """What of the goal holds, in words."""
    own = {row["group"]: row for row in rivals["against_vanilla"] if row["name"] == ROUTED}
    mad = [row for row in rivals["against_mad"] if row["name"] == ROUTED]
    gains = [own[group]["value"] for group in DISAGREEING]
    worse = [group for group, row in own.items() if row["value"] < 0 and row["p_adjusted"] < 0.05]
    below = [row["group"] for row in mad if row["value"] < 0 and row["p_adjusted"] < 0.05]
    time = rows[ROUTED]["time"]
    told = [
        f"Gained: {100 * gains[0]:.1f} points on sound, {100 * gains[1]:.1f} on picture "
        f"({'reached' if min(gains) >= LEAST_GAIN else 'not reached'}).",
        f"Worse than vanilla: {', '.join(worse) or 'nowhere, as far as can be seen'}.",
        f"Time: {time:.2f} of vanilla's ({'reached' if time <= MOST_TIME else 'not reached'}).",
        f"Worse than MAD: {', '.join(below) or 'nowhere, as far as can be seen'}.",
        "The control that drops a sense by the same asking reaches "
        f"{', '.join(_value(rows, DROPPED, group) for group in COMPARED)} % on {'; '.join(COMPARED)}, routed FMD "
        f"{', '.join(_value(rows, ROUTED, group) for group in COMPARED)} %.",
    ]
    return " ".join(told)


def _value(rows: dict[str, Any], name: str, group: str) -> str:
    return f"{100 * rows[name]['groups'][group]['value']:.1f}"


def _other_models(rivals: dict[str, Any], models: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for model in ({"name": "the package's", "rivals": rivals}, *models):
        router = model["rivals"]["router"].values()
        asked = sum(cell["right"] * cell["items"] for cell in router) / sum(cell["items"] for cell in router)
        for row in model["rivals"]["methods"]:
            if row["name"] in ("vanilla", "FMD", ROUTED, "FMD, routed by truth", DROPPED, "MAD"):
                yield [model["name"], row["name"], *_accuracies(row), f"{asked:.1%}" if row["name"] == ROUTED else ""]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "| --- |" + " ---: |" * (len(titles) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"
