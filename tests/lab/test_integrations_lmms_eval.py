"""Task files and the model for lmms-eval: against the installed package, or what it documents where there is none.

The stand-in below has the three classes of lmms-eval 0.7 that the model uses, with their fields, and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import yaml

import fmd_ext
from eval_data import write_benchmark
from fmd_ext.inputs.chat import prepare_batch
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.clips import ClipInputs, Reading
from fmd_ext.lab.lmms_eval import doc_to_text, doc_to_visual, mean_score, process_results, write_task
from fmd_ext.lab.lmms_eval.__main__ import main as write_tasks
from fmd_ext.lab.tiny import save_random_model, tiny_processor

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms_eval")
    write_benchmark(folder / "data", "avhbench")
    save_random_model(folder / "model", seed=1)
    return folder


@pytest.fixture(scope="module")
def docs(folder):
    path = write_task(load("avhbench", folder / "data"), folder / "tasks")
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def stand_in(monkeypatch):
    @dataclasses.dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None

    @dataclasses.dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    @dataclasses.dataclass
    class Instance:
        request_type: str
        arguments: tuple
        idx: int
        metadata: dict

        @property
        def args(self):
            return self.arguments

    class LMMs:
        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

    names = {"Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts}
    modules = {"": {}, ".api": {}, ".api.instance": names, ".api.model": {"lmms": LMMs}}
    for name, content in modules.items():
        module = types.ModuleType("lmms_eval" + name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, "lmms_eval" + name, module)


@pytest.fixture
def package(monkeypatch):
    """The model's class, and the class of requests."""
    if not INSTALLED:
        stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, "fmd_ext.lab.lmms_eval.model", raising=False)
    from lmms_eval.api.instance import Instance

    from fmd_ext.lab.lmms_eval.model import FMDModel

    yield FMDModel, Instance
    sys.modules.pop("fmd_ext.lab.lmms_eval.model", None)


def requests_for(instance, docs, **arguments):
    arguments = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, **arguments}
    return [
        instance(
            "generate_until",
            (doc_to_text(doc), arguments, doc_to_visual, number, "task", "test"),
            number,
            {"task": "task", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]


def test_the_model_answers_as_its_method_does(package, folder, docs):
    model_class, instance = package
    model = model_class(str(folder / "model"), method="fmd-zero:fork_layers=2", max_frames=4, batch_size=3)
    model.task_dict = {"task": {"test": docs}}
    results = model.generate_until(requests_for(instance, docs))
    clips = [load_clip(doc["path"], fps=2.0, max_frames=4) for doc in docs]
    with fmd_ext.patch(model._model, fork_layers=2, masking="zero"):
        for doc, clip, result in zip(docs, clips, results, strict=True):
            inputs = prepare_batch(tiny_processor(), [([clip], doc["prompt"])])
            ids = model._model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert result.text == tiny_processor().decode(ids, skip_special_tokens=True)
            assert result.token_counts.input_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["cmm", "daily-omni", "daily-omni-picture", "daily-omni-sound"])
def test_a_question_gets_just_the_senses_that_it_is_asked_with(package, folder, tmp_path, name):
    """The prompts and answers of ``fmd-ext eval``; a sound is given as lmms-eval gives sounds."""
    model_class, instance = package
    loaded = load(name, write_benchmark(tmp_path / "data", name))
    path = write_task(loaded, tmp_path / "tasks")
    own = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    model = model_class(str(folder / "model"), method="fmd-zero:fork_layers=2", max_frames=4)
    model.task_dict = {"task": {"test": own}}
    results = model.generate_until(requests_for(instance, own))
    shown = ClipInputs(tiny_processor(), Reading(max_frames=4)).read(loaded.items)
    with fmd_ext.patch(model._model, fork_layers=2, masking="zero"):
        for item, doc, clip, result in zip(loaded.items, own, shown, results, strict=True):
            inputs = prepare_batch(tiny_processor(), [([clip.clip], item.prompt)])
            ids = model._model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert result.text == tiny_processor().decode(ids, skip_special_tokens=True)
            assert result.token_counts.input_tokens == inputs["input_ids"].shape[1]
            (medium,) = doc_to_visual(doc)
            assert isinstance(medium, dict) == (item.senses == "sound")
            if isinstance(medium, dict):
                assert np.array_equal(medium["array"], clip.clip.audio) and medium["sampling_rate"] == 16000


def test_an_answer_ends_where_the_task_says(package, folder, docs):
    model_class, instance = package
    model = model_class(str(folder / "model"), method="vanilla", max_frames=4)
    model.task_dict = {"task": {"test": docs}}
    (whole,) = model.generate_until(requests_for(instance, docs[:1], num_beams=None))
    end = whole.text[1:3]
    (cut,) = model.generate_until(requests_for(instance, docs[:1], until=["", "no such thing", end]))
    assert len(end) == 2 and cut.text == whole.text.split(end)[0]
    assert model.generate_until(requests_for(instance, docs[:1], until=end))[0].text == cut.text


def test_what_the_model_cannot_do_is_an_error(package, folder, docs):
    model_class, instance = package
    with pytest.raises(TypeError, match="unknown model_args: frames"):
        model_class(str(folder / "model"), frames=3)
    with pytest.raises(ValueError, match="unknown method 'fdm'"):
        model_class(str(folder / "model"), method="fdm")
    model = model_class(str(folder / "model"))
    model.task_dict = {"task": {"test": docs}}
    with pytest.raises(ValueError, match="without beams here, got num_beams=4"):
        model.generate_until(requests_for(instance, docs[:1], num_beams=4))
    with pytest.raises(ValueError, match="does not know: penalty_alpha"):
        model.generate_until(requests_for(instance, docs[:1], penalty_alpha=0.5))
    model.task_dict = {"task": {"test": [{**docs[0], "path": 3}]}}
    with pytest.raises(ValueError, match="the task gave int"):
        model.generate_until(requests_for(instance, docs[:1]))


class Loader(yaml.SafeLoader):
    """Gives the name of a function instead of the function."""


Loader.add_constructor("!function", lambda loader, node: node.value)


def test_task_files(folder, docs):
    task = yaml.load((folder / "tasks/fmd_avhbench.yaml").read_text(), Loader)
    assert task["task"] == "fmd_avhbench" and task["cluster_key"] == "video"
    assert task["dataset_kwargs"]["data_files"]["test"] == str(folder / "tasks/fmd_avhbench.jsonl")
    names = [metric["metric"] for metric in task["metric_list"]]
    assert names[:2] == ["accuracy", "unparsed"] and "accuracy_av_matching" in names
    assert len(docs) == 6 and all(doc["kind"] == "yes-no" for doc in docs)  # without the caption
    produced = {name for doc in docs for name in process_results(doc, ["yes"])}
    assert produced == set(names)
    functions: dict[str, object] = {}
    exec((folder / "tasks/utils.py").read_text(), functions)
    used = {value for value in task.values() if isinstance(value, str) and value.startswith("utils.")}
    used |= {metric["aggregation"] for metric in task["metric_list"]}
    assert all(callable(functions[name.removeprefix("utils.")]) for name in used)


def test_answers_are_read_as_everywhere(docs):
    right, unparsed = process_results(docs[0], ["Yes, it is."]), process_results(docs[0], ["I know"])
    assert right["accuracy"] == {"score": 1.0, "video": "00001"} and right["unparsed"]["score"] == 0
    assert unparsed["accuracy"]["score"] == 0 and unparsed["unparsed"]["score"] == 1
    assert mean_score([right["accuracy"], unparsed["accuracy"]]) == 0.5


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_the_installed_package_finds_model_and_task(folder, docs):
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.tasks import TaskManager

    from fmd_ext.lab.lmms_eval import manifest

    assert isinstance(manifest(), ModelManifest)
    assert "fmd_avhbench" in TaskManager(include_path=str(folder / "tasks")).all_tasks


def test_malformed_records_are_refused_unless_allowed(tmp_path, monkeypatch, capsys):
    write_benchmark(tmp_path, "avqa")  # its last record has no choices
    arguments = ["lmms_eval", "--benchmark", "avqa", "--data", str(tmp_path), "--output", str(tmp_path / "tasks")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert write_tasks() == 2
    assert "1 records are not as published, the first: record 3 lacks multi_choice" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--allow-malformed"])
    assert write_tasks() == 0 and (tmp_path / "tasks/fmd_avqa.yaml").exists()
