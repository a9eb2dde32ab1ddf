"""``docs/evidence.md`` and its plots, from the recorded data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fmd_ext.config import FMDConfig
from fmd_ext.lab.diagnose import AttentionShare
from fmd_ext.lab.diagnose.attention import LayerShare
from fmd_ext.lab.diagnose.plots import Curve, curves, share_per_layer
from fmd_ext.lab.evidence.measure import ALPHAS, DISAGREEING, GROUPS, MASK_SCALES, TASKS, TEXT_DEPTHS
from fmd_ext.lab.evidence.rivals_page import rivals_lines
from fmd_ext.lab.plotting import figure, save, styled
from fmd_ext.lab.synthetic.scenes import RELATIONS
from fmd_ext.lab.training.loop import MIXTURES

NOTE = "<!-- Written by `python -m fmd_ext.lab.evidence` from docs/data/*.json: change those, never this page. -->"
SHORT = {
    TASKS[0]: "sound (V→A)",
    TASKS[1]: "picture (A→V)",
    TASKS[2]: "matching",
    TASKS[0] + DISAGREEING: "sound, disagreeing",
    TASKS[1] + DISAGREEING: "picture, disagreeing",
}
MASKINGS = ("zero", "attention")


def write_page(found: dict[str, Any], docs: Path) -> None:
    """Writes ``evidence.md`` and ``images/evidence_*.png`` below ``docs``, which holds ``data/training.jsonl``."""
    training = [json.loads(line) for line in (docs / "data" / "training.jsonl").read_text().splitlines()]
    images = docs / "images"
    training_curve(training, images / "evidence_training.png")
    curves(_depth_panels(found), images / "evidence_depth.png")
    curves(_weight_panels(found), images / "evidence_weights.png")
    curves(_text_panels(found), images / "evidence_text_weight.png")
    share_per_layer(_shares(found), images / "evidence_attention.png")
    (docs / "evidence.md").write_text("\n".join(_lines(found, training)) + "\n")


# --- plots ----------------------------------------------------------------------------------------------------------


@styled
def training_curve(training: Sequence[dict[str, Any]], path: Path) -> Path:
    """Loss, and the accuracy of the unpatched model on validation clips that agree and that are swapped."""
    drawn, (left, right) = figure(2, width=4.0, share_y=False)
    left.plot([line["step"] for line in training], [line["loss"] for line in training], color="#333333", linewidth=1.4)
    left.set(xlabel="step", ylabel="loss per question", yscale="log", title="training loss")
    judged = [line for line in training if "accuracy" in line]
    for task, colour, marker in zip(TASKS, ("#E69F00", "#0072B2", "#009E73"), "os^", strict=True):
        for relation, style in (("matched", "-"), ("swapped", "--")):
            values = [100 * line["accuracy"][task][relation] for line in judged]
            label = f"{SHORT[task]}, {relation}"
            steps = [line["step"] for line in judged]
            right.plot(steps, values, style, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    right.set(xlabel="step", ylabel="accuracy (%)", title="vanilla, validation clips")
    right.grid(axis="y")
    drawn.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save(drawn, path)


def _rows(found: dict[str, Any], masking: str, **fixed: Any) -> list[dict[str, Any]]:
    wanted = {"masking": masking, **fixed}
    return [row for row in found["test"]["grid"] if wanted.items() <= row["settings"].items()]


def _curves(found: dict[str, Any], rows: Sequence[dict[str, Any]], xs: Sequence[float]) -> list[Curve]:
    def column(group: str, key: str) -> list[float]:
        return [row["groups"][group][key] for row in rows]

    return [
        Curve(SHORT[g], xs, *(column(g, key) for key in ("value", "low", "high")), found["test"]["vanilla"][g]["value"])
        for g in GROUPS
    ]


def _depth_panels(found: dict[str, Any]) -> dict[str, list[Curve]]:
    depths = range(1, found["layers"] + 1)
    alpha = found["chosen"]["zero"]["settings"]["alpha"]
    return {
        f"fork layers, zero masking, alpha {alpha:g}": _curves(found, _rows(found, "zero", alpha=alpha), depths),
        "fork layers, attention masking": _curves(found, _rows(found, "attention"), depths),
    }


def _weight_panels(found: dict[str, Any]) -> dict[str, list[Curve]]:
    depth = found["chosen"]["zero"]["settings"]["fork_layers"]
    depths = dict.fromkeys((depth, 2))
    panels = {f"alpha, {_depth(d)}": _curves(found, _rows(found, "zero", fork_layers=d), ALPHAS) for d in depths}
    softened: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in found["test"]["mask_scale"]:
        softened.setdefault((row["settings"]["fork_layers"], row["settings"]["alpha"]), []).append(row)
    for (d, alpha), rows in softened.items():
        unscaled = _rows(found, "zero", fork_layers=d, alpha=alpha)
        panels[f"mask scale, {_depth(d)}, alpha {alpha:g}"] = _curves(found, unscaled + rows, (0.0, *MASK_SCALES))
    return panels


def _depth(layers: int) -> str:
    return "1 fork layer" if layers == 1 else f"{layers} fork layers"


def _text_panels(found: dict[str, Any]) -> dict[str, list[Curve]]:
    """At each depth the weights in order; 0.5 is in the grid."""
    panels = {}
    for depth in TEXT_DEPTHS:
        rows = [row for row in found["text_weight"] if row["settings"]["fork_layers"] == depth]
        weighted = [(row["settings"]["text_weight"], row) for row in rows]
        weighted.append((0.5, _rows(found, "attention", fork_layers=depth)[0]))
        weighted.sort(key=lambda pair: pair[0])
        panels[f"text weight, {_depth(depth)}"] = _curves(found, [row for _, row in weighted], [w for w, _ in weighted])
    return panels


def _shares(found: dict[str, Any]) -> dict[str, AttentionShare]:
    names = {None: "vanilla", "zero": "zero masking", "attention": "attention masking"}
    layers: dict[str, list[LayerShare]] = {}
    for row in found["attention"]:
        share = LayerShare(row["layer"], row["branch"], row["visual"], row["audio"], row["text"])
        layers.setdefault(names[row["settings"].get("masking")], []).append(share)
    return {name: AttentionShare(tuple(rows)) for name, rows in layers.items()}


# --- words ----------------------------------------------------------------------------------------------------------


def _lines(found: dict[str, Any], training: Sequence[dict[str, Any]]) -> Iterator[str]:
    test, chosen = found["test"], found["chosen"]
    clips, last = MIXTURES["together"], MIXTURES["compared"]
    yield from (NOTE, "", "# Evidence", "")
    yield (
        "What fork-merge decoding does to one small model: a Qwen2.5-Omni thinker with "
        f"{found['layers']} decoder layers and {found['parameters'] / 1e6:.1f} M parameters, trained from scratch on "
        "synthetic clips of two seconds, in which one of eight kinds of objects, or two, can be seen and heard. It "
        "comes with the package. What holds here need not hold for the 7B model; there is no result on pretrained "
        "weights."
    )
    yield from ("", "`python -m fmd_ext.lab.evidence` measures again and rewrites this page.", "", "## The model", "")
    yield (
        "Training (`scripts/train`) leans on the picture. Once both senses come together, of "
        f"{sum(clips.clips.values())} clips of a step {clips.clips['video']} have a picture only, "
        f"{clips.clips['audio']} a sound only and {clips.clips['both']} both; where both are there, they agree in "
        f"{clips.agreeing:.0%} of the clips. In the last part {last.clips['compared']} clips are added of which "
        "only is asked whether picture and sound match. Without a clip it is also asked which modality a question "
        "needs. The model never sees a masked embedding. "
        f"The curve, over {training[-1]['step']} steps:"
    )
    yield from ("", "![training curve](images/evidence_training.png)", "")
    yield (
        f"Unpatched, on {test['clips']} test clips that neither training nor any choice has seen. Half of them match; "
        "in the others a part is silent, off screen, or the sound is another's (swapped). Accuracy with 95 % "
        "intervals, clustered by clip; a coin would reach 50 %:"
    )
    yield ""
    yield from _by_relation(test["relations"]["vanilla"])
    yes = ", ".join(f"{SHORT[task]} {test['says_yes'][task]:.0%} ({test['yes'][task]:.0%})" for task in TASKS)
    yield from ("", f"How often it says yes, and in brackets how often that is right: {yes}.", "")
    yield (
        "Every sort of question, the share that greedy decoding answers to the letter, vanilla. Audio-Visual Location "
        "knows two answers, left and right: 50 % there is chance."
    )
    yield ""
    yield from _header(["", "picture and sound agree", "they do not"])
    for task in dict.fromkeys(row["task"] for row in found["tasks"]):
        cells = {
            row["agreeing"]: f"{row['accuracy']:.1%} of {row['items']}" for row in found["tasks"] if row["task"] == task
        }
        yield _row([task, cells.get(True, ""), cells.get(False, "")])
    yield from ("", "## What fork-merge decoding changes", "")
    yield (
        f"Settings were chosen on {chosen['clips']} validation clips, by the mean accuracy of the three tasks (vanilla "
        f"reaches {chosen['vanilla']:.1%}): " + "; ".join(_choice(chosen, masking) for masking in MASKINGS) + "."
    )
    yield ""
    yield from _main_table(test)
    yield ""
    yield "`*`: p below 0.05 by a sign-flip test clustered by clip, after Holm's correction over all ten. In words:"
    yield ""
    yield from _verdicts(test)
    yield from ("", "By how picture and sound belong together:", "")
    for masking in MASKINGS:
        yield from (f"{masking} masking:", "")
        yield from _by_relation(test["relations"][masking])
        yield ""
    yield from ("## Fork depth", "", "![accuracy against fork depth](images/evidence_depth.png)", "")
    yield "Dotted: vanilla. Bands: 95 % intervals. All depths and weights, zero masking, on the test clips:"
    yield ""
    for group in GROUPS:
        yield from (f"{SHORT[group]} (vanilla {test['vanilla'][group]['value']:.1%}):", "")
        yield from _grid(found, group)
        yield ""
    yield from ("## Weight of the merge, soft masking", "", "![alpha and mask scale](images/evidence_weights.png)", "")
    yield (
        "A mask scale of 1 masks nothing. Between 0 and 1 it acts on the residual stream only: the norm before the "
        "first attention divides the factor out again."
    )
    yield ""
    yield from ("## Who leads at text positions", "", "![text weight](images/evidence_text_weight.png)", "")
    yield (
        "Attention masking; at text positions, the answer's among them, a text weight of 0 takes the audio branch "
        "alone, 1 the visual one, 0.5 is fork-merge decoding's average."
    )
    alone = {row["settings"]["text_weight"]: row["groups"] for row in found["text_weight"] if _all_layers(found, row)}
    if alone:
        heard, seen = (group + DISAGREEING for group in TASKS[:2])
        yield (
            "With all layers forked the branches never meet before the answer: alone, the audio branch answers "
            f"{alone[0.0][heard]['value']:.1%} of the questions about sound on disagreeing clips (vanilla "
            f"{test['vanilla'][heard]['value']:.1%}), the visual branch {alone[1.0][seen]['value']:.1%} of those about "
            f"the picture (vanilla {test['vanilla'][seen]['value']:.1%}). That is what masking can reach in this model."
        )
    yield ""
    yield from rivals_lines(found)
    yield from ("## Attention", "", "![attention of the last question token](images/evidence_attention.png)", "")
    yield "Where the last token of a question about the sound looks, mean over heads and 100 questions; per layer:"
    yield ""
    yield from _attention_table(found)
    machine, versions = found["machine"], found["versions"]
    asked = ", ".join(f"{test['vanilla'][task]['items']} questions about {SHORT[task]}" for task in TASKS)
    yield from ("", "## How it was measured", "")
    yield (
        f"{asked}. A clip is a "
        "real mp4 file, decoded and put through the model's processor; each clip is read once and its questions go on "
        f"from its cache, by the patched model itself. {machine['cpu']}, one thread, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {test['seconds']:.0f} s for the test split."
    )


def _all_layers(found: dict[str, Any], row: dict[str, Any]) -> bool:
    return row["settings"]["fork_layers"] == found["layers"]


def _choice(chosen: dict[str, Any], masking: str) -> str:
    settings = FMDConfig(**chosen[masking]["settings"])
    alpha = f", alpha {settings.alpha:g}" if masking == "zero" else ""
    return f"{masking} masking {_depth(settings.fork_layers)}{alpha} ({chosen[masking]['accuracy']:.1%})"


def _main_table(test: dict[str, Any]) -> Iterator[str]:
    yield from _header(["", "vanilla", *(f"{masking} masking" for masking in MASKINGS)])
    for group in GROUPS:
        cells = [_interval(test["vanilla"][group])]
        for masking in MASKINGS:
            row = next(r for r in test["comparisons"] if (r["masking"], r["group"]) == (masking, group))
            star = " *" if row["p_adjusted"] < 0.05 else ""
            cells.append(f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f}){star}")
        yield _row([SHORT[group], *cells])


def _verdicts(test: dict[str, Any]) -> Iterator[str]:
    for masking in MASKINGS:
        words: dict[str, list[str]] = {"better": [], "worse": [], "no different, as far as can be seen": []}
        for row in test["comparisons"]:
            if row["masking"] == masking:
                sure = row["p_adjusted"] < 0.05
                kind = "no different, as far as can be seen" if not sure else "better" if row["value"] > 0 else "worse"
                words[kind].append(SHORT[row["group"]])
        told = "; ".join(f"{kind}: {', '.join(groups)}" for kind, groups in words.items() if groups)
        yield f"* {masking} masking is {told}."


def _by_relation(table: dict[str, Any]) -> Iterator[str]:
    yield from _header(["", *RELATIONS])
    for task in TASKS:
        yield _row([SHORT[task], *(_interval(table[task][relation]) for relation in RELATIONS)])


def _grid(found: dict[str, Any], group: str) -> Iterator[str]:
    depths = range(1, found["layers"] + 1)
    yield from _header(["fork layers", *map(str, depths)])
    for alpha in ALPHAS:
        rows = _rows(found, "zero", alpha=alpha)
        yield _row([f"zero, alpha {alpha:g}", *(f"{row['groups'][group]['value']:.1%}" for row in rows)])
    cells = (f"{row['groups'][group]['value']:.1%}" for row in _rows(found, "attention"))
    yield _row(["attention", *cells])


def _attention_table(found: dict[str, Any]) -> Iterator[str]:
    yield from _header(["", "layer", "branch", "video", "audio", "text"])
    for row in found["attention"]:
        name = row["settings"].get("masking", "vanilla")
        shares = (f"{row[key]:.1%}" for key in ("visual", "audio", "text"))
        yield _row([name, str(row["layer"] + 1), row["branch"], *shares])


def _interval(cell: dict[str, Any]) -> str:
    return f"{100 * cell['value']:.1f} ({100 * cell['low']:.1f} to {100 * cell['high']:.1f})"


def _header(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "| --- |" + " ---: |" * (len(titles) - 1)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
