"""The part of ``docs/evidence.md`` about routing and the rivals, from the recorded data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fmd_ext.lab.evidence.probe import DRAWS, OTHER, SAME
from fmd_ext.lab.evidence.rivals import GROUPS, LEAST_LOSS, ROUTED

LEAST_GAIN = 0.10  # what routing is to gain where the senses disagree, each
MOST_TIME = 1.1  # of vanilla's
DROPPED = "drop a sense, by asking"
DISAGREEING = ("sound, disagreeing", "picture, disagreeing")
COMPARED = ("sound, agreeing", *DISAGREEING)


def rivals_lines(found: dict[str, Any]) -> Iterator[str]:
    """``found``: the whole record."""
    rivals, models = found["rivals"], found["models"]
    rows = {row["name"]: row for row in rivals["methods"]}
    yield from ("## Which sense the question needs", "")
    yield (
        'With `text_weight="auto"` the model is asked, text only, which modality a question needs '
        "([method.md](method.md#routing)). Training taught this model to answer that, as pretrained models can. "
        f"On the test questions it names the right one for {_router(rivals['router'])}."
    )
    yield ""
    yield from _other_judges(found)
    yield (
        f"Every method on the same {rivals['items']} questions about {rivals['clips']} test clips, each question a "
        "whole prompt. Settings were chosen on "
        f"{rivals['validation_clips']} validation clips: of those that lose no more than {LEAST_LOSS:.0%} against "
        "vanilla in any column, if there are such, the best by the mean over the six. Accuracy in %:"
    )
    yield ""
    yield from _table(
        ["", *GROUPS, "passes", "layer rows", "time", "settings"],
        (_method(row, rows["vanilla"]) for row in rows.values()),
    )
    yield ""
    yield (
        "Passes (calls of the decoder), rows computed by its layers, and time are multiples of vanilla's, the asking "
        "included. Time is the median over rounds in which both run in turn."
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
    yield from _markers(found)
    yield from _exact(found)


def _router(router: dict[str, Any]) -> str:
    return ", ".join(f"{cell['right']:.1%} of {cell['items']} that need {need}" for need, cell in router.items())


def _method(row: dict[str, Any], vanilla: dict[str, Any]) -> list[str]:
    cost = [row["cost"][key] / vanilla["cost"][key] for key in ("passes", "layer_rows")]
    chosen = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
    return [row["name"], *_accuracies(row), *(f"{value:.2f}" for value in (*cost, row["time"])), chosen]


def _accuracies(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row['groups'][group]['value']:.1f}" for group in GROUPS]


def _other_judges(found: dict[str, Any]) -> Iterator[str]:
    """What is known without asking: the branches' confidence, attention, and a probe, each on validation clips."""
    other = found["alternatives"]
    yield (
        "Other judges, on validation clips: the branch that is surer, all layers forked; and a linear probe of the "
        "prompt that asks, fitted to a few labelled prompts, with other objects or from MUSIC-AVQA and AVQA "
        f"(named rightly: mean of {DRAWS} draws; in brackets the gain over asking on the same questions; `*` after "
        "Holm's correction within a row). Where the last token looks tells picture from sound in "
        f"{other['attention']['told_apart']:.0%} at the best threshold."
    )
    yield ""
    sure = [f"{100 * other['confidence'][group]:.1f}" for group in GROUPS]
    rows = [["the package's", "surer branch", "", "", *sure]]
    models = ({"name": "the package's", **found}, *found["models"])
    for name, probe in ((model["name"], model["probe"]) for model in models if "probe" in model):
        rows.append([name, "asking", "0", f"{probe['asked']['right']:.1%}", *[""] * len(GROUPS)])
        for kind in (SAME, OTHER):
            cells = (
                f"{100 * row['probe']:.1f} ({100 * row['value']:+.1f}{_star(row)})" for row in probe[kind]["routed"]
            )
            right = sum(probe[kind]["right"]) / len(probe[kind]["right"])
            rows.append([name, f"probe, {kind}", str(probe[kind]["labelled"]), f"{right:.1%}", *cells])
    yield from _table(["", "judge", "labelled", "named rightly", *GROUPS], rows)
    yield ""


def _exact(found: dict[str, Any]) -> Iterator[str]:
    """Open answers and choices; the package's model, and others that were asked."""
    models = [{"name": "the package's", **found}, *found["models"]]
    models = [model for model in models if "exact" in model]
    if not models:
        return
    first = models[0]["exact"]
    tested = sum("p_adjusted" in row for row in first["methods"])
    clips = ", ".join(f"{model['name']}: {model['exact']['clips']}" for model in models)
    yield (f"Exact answers, same settings, test clips ({clips}); `*`: differs from vanilla, after Holm over {tested}:")
    yield ""
    groups = list(dict.fromkeys(row["group"] for row in first["methods"]))
    rows = []
    for model in models:
        for name in dict.fromkeys(row["name"] for row in model["exact"]["methods"]):
            own = [row for row in model["exact"]["methods"] if row["name"] == name]
            rows.append([model["name"], name, *(f"{100 * row['value']:.1f}{_star(row)}" for row in own)])
    yield from _table(["", "method", *groups], rows)
    yield ""


def _markers(found: dict[str, Any]) -> Iterator[str]:
    """The trial without markers, of the package's model."""
    if "markers" not in found:
        return
    yield (
        "Markers left to the branch that sees their clip, attention masking, on validation clips (gain over markers in "
        "both):"
    )
    yield ""
    rows = []
    for row in found["markers"]["rows"]:
        cells = (
            f"{100 * row['without'][cell['group']]:.1f} ({100 * cell['value']:+.1f}{_star(cell)})"
            for cell in row["against"]
        )
        weights = "/".join(f"{weight:g}" for weight in row["settings"]["text_weight"].values())
        rows.append([f"fork layers {row['settings']['fork_layers']}, text weights {weights}", *cells])
    yield from _table(["", *GROUPS], rows)
    yield ""


def _star(row: dict[str, Any]) -> str:
    return " *" if row.get("p_adjusted", 1.0) < 0.05 else ""


def _differences(rows: Sequence[dict[str, Any]], name: str) -> Iterator[str]:
    for row in rows:
        if row["name"] == name:
            yield f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f}){_star(row)}"


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
