"""``python -m fmd_ext.lab.evidence``: chooses settings on validation clips, measures on test clips, writes the page.

It needs the extras ``omni``, ``eval`` (scipy) and ``plots`` (matplotlib), and about half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from fmd_ext.config import FMDConfig
from fmd_ext.lab import trained
from fmd_ext.lab.bench.machine import describe
from fmd_ext.lab.evidence.alternatives import measure_alternatives
from fmd_ext.lab.evidence.answers import YesNoQuestions
from fmd_ext.lab.evidence.exact import FAMILIES as EXACT_FAMILIES
from fmd_ext.lab.evidence.exact import measure_exact
from fmd_ext.lab.evidence.measure import (
    attention_before_and_after,
    choose,
    measure,
    measure_tasks,
    measure_text_weights,
)
from fmd_ext.lab.evidence.page import write_page
from fmd_ext.lab.evidence.probe import measure_probe
from fmd_ext.lab.evidence.prompts import WholePrompts
from fmd_ext.lab.evidence.rivals import BY_TRUTH, ROUTED, measure_rivals
from fmd_ext.lab.evidence.rivals_page import DISAGREEING
from fmd_ext.lab.synthetic import Scene, split_scenes
from fmd_ext.lab.synthetic.dataset import BALANCED
from fmd_ext.lab.training.pool import Pool, build_pool

FAMILIES = ("avhbench",)  # of questions on which methods are compared
PROMPTS = 100  # for the attention shares
PARTS = ("exact", "probe")  # that go on from the recorded comparison: its settings
CLIPS, CLIPS_OF_OTHERS = (90, 510), (60, 300)  # of the comparison with rivals: validation, test


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.lab.evidence", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="for the clips (%(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="page, data and plots (%(default)s)")
    parser.add_argument("--val-clips", type=int, default=360, help="(%(default)s)")
    parser.add_argument("--test-clips", type=int, default=1020, help="(%(default)s)")
    parser.add_argument(
        "--rival-clips",
        type=int,
        nargs=2,
        metavar=("VAL", "TEST"),
        help="for the comparison with rivals (90 and 510; of another --model 60 and 300)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="compare the methods on this model only, as scripts/train makes it, and add it to the record",
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        default=[],
        help="measure this part alone, of the package's model or of each --model, and add it to the record",
    )
    parser.add_argument("--page-only", action="store_true", help="write page and plots anew from the recorded data")
    args = parser.parse_args()
    record = args.docs / "data" / "evidence.json"
    torch.set_num_threads(1)
    given = [name.split("=", 1) for name in args.model]
    if args.part:
        found = json.loads(record.read_text())
        models = {model["name"]: model for model in found["models"]}
        for part in args.part:
            if not given:
                found[part] = measured(part, trained.MODEL, args.work, found["rivals"], args.rival_clips or CLIPS)
            for name, folder in given:
                clips = args.rival_clips or CLIPS_OF_OTHERS
                models[name][part] = measured(part, Path(folder), args.work, models[name]["rivals"], clips)
        record.write_text(json.dumps(found, indent=1))
    elif given:
        found = json.loads(record.read_text())
        for name, folder in given:
            others = [model for model in found["models"] if model["name"] != name]
            rivals = compared(Path(folder), args.work, *(args.rival_clips or CLIPS_OF_OTHERS))
            found["models"] = [*others, {"name": name, "rivals": rivals}]
        record.write_text(json.dumps(found, indent=1))
    elif not args.page_only:
        found = collect(args.work, args.val_clips, args.test_clips)
        clips = args.rival_clips or CLIPS
        found["rivals"] = compared(trained.MODEL, args.work, *clips)
        found |= {part: measured(part, trained.MODEL, args.work, found["rivals"], clips) for part in PARTS}
        found["models"] = json.loads(record.read_text())["models"] if record.exists() else []  # those of --model stay
        record.write_text(json.dumps(found, indent=1))
        best = max(("zero", "attention"), key=lambda masking: found["chosen"][masking]["accuracy"])
        FMDConfig(**found["chosen"][best]["settings"]).to_file(trained.SETTINGS)
        rows = {row["name"]: row for row in found["rivals"]["methods"]}
        FMDConfig(**rows[ROUTED]["settings"]).to_file(trained.ROUTED)
        trained.FIGURES.write_text(json.dumps(demo_figures(found), indent=1) + "\n")
    write_page(json.loads(record.read_text()), args.docs)


def collect(work: Path, val_clips: int, test_clips: int) -> dict:
    """Everything that the page shows of the package's model, but the rivals."""
    model, processor = load(trained.MODEL)
    validation = YesNoQuestions(model, processor, *clips_of(work, processor, "val", val_clips))
    chosen = choose(validation, model)
    pool, scenes = clips_of(work, processor, "test", test_clips)
    test = YesNoQuestions(model, processor, pool, scenes)
    settings = [chosen[masking]["settings"] for masking in ("zero", "attention")]
    return {
        "chosen": chosen,
        "alternatives": measure_alternatives(validation, model, PROMPTS),
        "test": measure(test, model, chosen),
        "tasks": measure_tasks(model, processor, pool, scenes),
        "text_weight": measure_text_weights(test, model),
        "attention": attention_before_and_after(test, model, settings, PROMPTS),
        "layers": model.config.get_text_config().num_hidden_layers,
        "parameters": model.num_parameters(),
        **describe(torch.device("cpu")),
    }


def demo_figures(found: dict) -> dict:
    """What `fmd-ext demo` tells: accuracy in % where the senses disagree, of sound and of picture, by method."""
    rows = {row["name"]: row for row in found["rivals"]["methods"]}
    names = {"vanilla": "vanilla", "FMD": "FMD", "FMD routed": ROUTED}
    told = {
        name: [round(100 * rows[row]["groups"][group]["value"], 1) for group in DISAGREEING]
        for name, row in names.items()
    }
    return {"clips": found["rivals"]["clips"], "disagreeing": told}


def compared(folder: Path, work: Path, val_clips: int, test_clips: int) -> dict:
    """All methods on the model in ``folder``."""
    model, processor = load(folder)
    pool, scenes = clips_of(work, processor, "val", val_clips)
    validation = WholePrompts(model, processor, pool, scenes, ["avhbench"])
    test = WholePrompts(model, processor, *clips_of(work, processor, "test", test_clips), FAMILIES)
    return measure_rivals(model, validation, test)


def measured(part: str, folder: Path, work: Path, rivals: dict, clips: tuple[int, int]) -> dict:
    """One of PARTS for the model in ``folder``, with the settings that ``rivals`` records."""
    model, processor = load(folder)
    settings = {row["name"]: row["settings"] for row in rivals["methods"]}
    if part == "exact":
        pool, scenes = clips_of(work, processor, "test", clips[1])
        return measure_exact(model, WholePrompts(model, processor, pool, scenes, EXACT_FAMILIES), settings)
    pool, scenes = clips_of(work, processor, "val", clips[0])
    validation = WholePrompts(model, processor, pool, scenes, FAMILIES)
    return measure_probe(model, validation, scenes, settings[BY_TRUTH])


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor."""
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def clips_of(work: Path, processor: Any, split: str, clips: int) -> tuple[Pool, list[Scene]]:
    """The first ``clips`` clips of a split, rendered once below ``work``."""
    scenes = split_scenes(split, clips, BALANCED)
    return build_pool(work / f"{split}{clips}", processor, scenes), scenes


if __name__ == "__main__":
    main()
