"""Task files for lmms-eval from a benchmark's published data, with our prompts and our reading of answers.

One form serves all benchmarks: the questions as JSON lines, a YAML file, and a module of three lines that the YAML's
functions come from. Captions are left out: their scores are of a corpus, and lmms-eval has tasks for them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import Loaded
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.run import judged
from fmd_ext.lab.eval.whole_files import whole_file

UTILS = """\
from fmd_ext.lab.lmms_eval import doc_to_target, doc_to_text, doc_to_visual, mean_score, process_results

__all__ = ["doc_to_target", "doc_to_text", "doc_to_visual", "mean_score", "process_results"]
"""

TASK = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
cluster_key: video
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: !function utils.doc_to_target
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
{metrics}
metadata:
  - version: 0.1
    questions: {digest}
"""
METRIC = """\
  - metric: {name}
    aggregation: !function utils.mean_score
    higher_is_better: {better}
"""


def write_task(loaded: Loaded, folder: str | Path) -> Path:
    """Writes the task ``fmd_<benchmark>`` into ``folder`` and returns the path of its YAML file.

    Questions whose video is missing are left out, captions too. A question about one sense, or with a sound file of its
    own, gets a copy that holds just that in ``folder/clips``, so that any model of lmms-eval is asked alike. The
    metrics are accuracy, the share of unparsed answers, and the accuracy in each group of the benchmark's first table,
    all with lmms-eval's errors clustered by video. Raises ValueError where no question is left, and for a clip that
    cannot be copied.
    """
    folder = Path(folder).resolve()
    items = [item for item in loaded.items if item.kind != "caption" and item.path is not None]
    if not items:
        raise ValueError(f"none of the questions in {', '.join(map(str, loaded.files))} has a video and a score")
    items = [dataclasses.replace(item, path=whole_file(item, folder / "clips"), sound=None) for item in items]
    folder.mkdir(parents=True, exist_ok=True)
    task = "fmd_" + loaded.benchmark.name.replace("-", "_")
    table = loaded.benchmark.tables[0]
    questions = folder / f"{task}.jsonl"
    questions.write_text("".join(json.dumps(_row(item, table), ensure_ascii=False) + "\n" for item in items))
    groups = dict.fromkeys(_metric(item, table) for item in items)
    names = ["accuracy", "unparsed", *filter(None, groups)]
    (folder / "utils.py").write_text(UTILS)
    path = folder / f"{task}.yaml"
    path.write_text(
        TASK.format(
            task=task,
            questions=json.dumps(str(questions)),
            max_new_tokens=max(loaded.benchmark.max_new_tokens[item.kind] for item in items),
            metrics="".join(
                METRIC.format(name=name, better=str(name != "unparsed").lower()) for name in names
            ).rstrip(),
            digest=loaded.digest,
        )
    )
    return path


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The path of a video; of a sound, as lmms-eval has it, ``array`` (float32 mono) and ``sampling_rate``, and its
    ``path``, from which our own model reads it."""
    if doc["senses"] != "sound":
        return [doc["path"]]
    clip = load_clip(doc["path"], progress=False)
    return [{"array": clip.audio, "sampling_rate": clip.sampling_rate, "path": doc["path"]}]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return doc["prompt"]


def doc_to_target(doc: Mapping[str, Any]) -> str:
    return doc["answer"]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metric to what lmms-eval collects of an item: its score, and the video as the cluster."""
    item = Item(doc["id"], doc["video"], None, doc["question"], doc["kind"], doc["answer"], tuple(doc["options"]))
    parsed, score = judged(item, results[0])
    scores = {"accuracy": score, "unparsed": float(parsed is None)}
    if doc["metric"]:
        scores[doc["metric"]] = score
    return {name: {"score": value, "video": doc["video"]} for name, value in scores.items()}


def mean_score(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["score"] for row in rows) / len(rows) if rows else float("nan")


def _row(item: Item, table: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "video": item.video,
        "path": str(item.path.resolve()),
        "senses": item.senses,
        "prompt": item.prompt,
        "kind": item.kind,
        "answer": item.answer,
        "options": list(item.options),
        "question": item.question,
        "metric": _metric(item, table),
    }


def _metric(item: Item, table: str) -> str:
    group = next(iter(item.values(table)), "")
    return "accuracy_" + re.sub(r"\W+", "_", group).strip("_").lower() if group else ""
