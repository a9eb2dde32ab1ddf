"""A model that this package does not know, with an adapter from outside: registered, or of an installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_model

import fmd_ext
import fmd_ext.adapters as adapters
from fmd_ext import FMDConfig
from fmd_ext.adapters import ADAPTERS, Adapter, TokenSource, find_adapter, register
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.inputs.sample_clip import write_clip
from fmd_ext.lab.tiny.processor import byte_tokenizer
from fmd_ext.models.classes import class_for
from outside_model.duo_fmd import ADAPTER, DuoProcessor
from outside_model.modeling_duo import DuoConfig, DuoModel
from paths import ROOT, TESTS
from ports import clip

CODE = TESTS / "support" / "outside_model"
TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The table of adapters as it was, afterwards."""
    before = dict(ADAPTERS)
    adapters._register_installed.cache_clear()
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)
    adapters._register_installed.cache_clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DuoModel(DuoConfig(text_config=TEXT)).eval()


@pytest.fixture
def inputs():
    """A clip with both senses, one to see, text."""
    about = [([clip(0)], "Is it loud?"), ([clip(1, sound=False)], "What?"), ([], "Who is that?")]
    return DuoProcessor(byte_tokenizer()).prepare_clips(about)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes a package with these entry points look installed; gives the folder that it lies in."""

    def install(points):
        folder = tmp_path / "site"
        about = folder / "duo_fmd-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: duo-fmd\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(points)
        shutil.copy(CODE / "duo_fmd.py", folder)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield install
    sys.modules.pop("duo_fmd", None)


BOTH = "[fmd_ext.adapters]\nduo = duo_fmd:ADAPTER\n[fmd_ext.models]\nduo = duo_fmd:DuoLoader\n"

# --- in a program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"masking": "zero", "alpha": 0.7}, {"masking": "attention", "text_weight": 0.3}])
def test_a_registered_model_forks(model, inputs, settings):
    """Its language model sees embeddings only; labels come from the ids that the outer module was given."""
    register("duo", ADAPTER)
    config = FMDConfig(fork_layers=2, **settings).resolve(FMDConfig(), 4)
    keep = inputs["attention_mask"].bool()
    vanilla = model(**inputs).logits
    expected = reference_logits(model, config, **inputs), reference_generate(model, config, 5, **inputs)
    state = {name: list(vars(module)) for name, module in model.named_modules()}
    handle = fmd_ext.patch(model, config)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[keep], expected[0][keep], atol=1e-4, rtol=0)
    assert handle.last_call.plan.forked.tolist() == [True, False, False] and not handle.fusions["rotation"].why_not
    assert (logits - vanilla)[0][keep[0]].abs().max() > 0.02 and (logits - vanilla)[1:][keep[1:]].abs().max() < 1e-4
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist() == expected[1].tolist()
    fmd_ext.unpatch(model)
    assert torch.equal(model(**inputs).logits, vanilla)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == state


def test_a_second_call_within_generate_is_not_the_prompts(model, inputs):
    """As a contrastive processor makes it: of the language model alone, on embeddings as long as the prompt's."""
    register("duo", ADAPTER)
    embeds = model._embed(inputs["input_ids"], inputs["patches"], inputs["sounds"])
    plain, seen = model.llm(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, []

    def contrast(ids, scores):
        seen.append(model.llm(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits)
        return scores

    alone = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with fmd_ext.patch(model, fork_layers=2):
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, logits_processor=[contrast])
    assert torch.equal(tokens, expected) and not torch.equal(tokens, alone) and len(seen) == 3
    keep = inputs["attention_mask"].bool()
    for logits in seen:
        torch.testing.assert_close(logits[keep], plain[keep], atol=1e-4, rtol=0)


def test_ids_that_become_more_embeddings_are_refused(model, inputs):
    """A model that makes several positions of one placeholder: labels would stand beside them."""
    register("duo", ADAPTER)
    embed = model._embed
    model._embed = lambda *given: embed(*given).repeat_interleave(2, dim=1)
    inputs["attention_mask"] = inputs["attention_mask"].repeat_interleave(2, dim=1)
    labels = find_adapter(model).labels_of(model, inputs["input_ids"], inputs).repeat_interleave(2, dim=1)
    length = labels.shape[1]
    message = f"has {length // 2} token ids, and the decoder gets {length} positions: labels.*adapter='text'"
    with fmd_ext.patch(model, fork_layers=2):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with fmd_ext.patch(model.llm, adapter="text", fork_layers=2) as handle:
        model.generate(**inputs, max_new_tokens=2, modality_labels=labels)  # handed on to the language model
        assert handle.last_call.plan.forked.tolist() == [True, False, False]


def test_before_it_is_registered_it_is_refused_by_name(model):
    with pytest.raises(TypeError, match=r"no adapter for DuoModel \(model_type 'duo'\). Supported model types: phi4"):
        fmd_ext.patch(model)
    with pytest.raises(ValueError, match="unknown adapter 'duo'; the adapters are 'phi4_multimodal', "):
        fmd_ext.patch(model, adapter="duo")
    fmd_ext.patch(model, adapter=ADAPTER)  # an adapter that is handed over needs no name
    fmd_ext.unpatch(model)


def test_registering(model):
    register("duo", ADAPTER)
    register("duo", ADAPTER)
    assert find_adapter(model) is find_adapter(model, "duo") is ADAPTER
    other = Adapter("Other", ("other",), ("",), ("model",))
    for name, adapter, error, message in (
        ("duo", other, ValueError, "there is another adapter 'duo' already, Duo"),
        ("mine", ADAPTER, ValueError, "model type 'duo' of adapter 'mine' is served by 'duo' already"),
        ("mine", {"decoder": "llm"}, TypeError, "adapter 'mine' must be a fmd_ext.adapters.Adapter, got {'decoder'"),
    ):
        with pytest.raises(error, match=message):
            register(name, adapter)
        assert "mine" not in ADAPTERS and ADAPTERS["duo"] is ADAPTER


@pytest.mark.parametrize(
    "made, error, message",
    [
        (
            lambda: TokenSource("video", "id", ("x",)),
            ValueError,
            "modality 'video': accepted are 'visual', 'audio' and",
        ),
        (lambda: TokenSource("visual", "id", "pixels"), TypeError, "inputs of TokenSource must be a tuple of strings"),
        (
            lambda: Adapter("A", "a", ("",), ("m",)),
            TypeError,
            "model_types of Adapter must be a tuple of strings, got 'a'",
        ),
        (lambda: Adapter("A", ("a",), ("",), "m"), TypeError, "decoder of Adapter must be a tuple of strings, got 'm'"),
        (lambda: Adapter("A", ("a",), ("",), ("m",), ("x",)), TypeError, "sources of A must be a tuple of TokenSource"),
    ],
)
def test_adapters_written_wrongly(made, error, message):
    with pytest.raises(error, match=message):
        made()


# --- an installed package ---------------------------------------------------------------------------------------------


def test_an_installed_adapter_is_found(model, installed):
    installed(BOTH)
    assert find_adapter(model).name == "Duo" and find_adapter(model, "duo").name == "Duo"
    assert class_for({"model_type": "duo"}).__name__ == "DuoLoader"
    assert class_for({"architectures": ["Unknown", "duo"], "model_type": "qwen2"}).__name__ == "DuoLoader"
    with pytest.raises(ValueError, match="it is of type 'trio'; supported types are duo, qwen2_5_omni"):
        class_for({"model_type": "trio"})


def test_a_faulty_package_stops_nothing_else(model, installed, caplog):
    installed("[fmd_ext.adapters]\nbroken = duo_fmd:NOTHING\nodd = duo_fmd:DuoLoader\nduo = duo_fmd:ADAPTER\n")
    assert find_adapter(model).name == "Duo"
    said = [record.getMessage() for record in caplog.records if record.name == "fmd_ext.adapters"]
    assert len(said) == 2 and "broken (duo_fmd:NOTHING): AttributeError" in said[0] and "odd (" in said[1]
    model.config.model_type = "trio"
    for _ in range(2):
        with pytest.raises(TypeError, match=r"Not loaded: broken \(duo_fmd:NOTHING\): AttributeError: .*; odd \("):
            find_adapter(model)
    assert len([r for r in caplog.records if r.name == "fmd_ext.adapters"]) == 2


def test_a_package_whose_loader_is_missing_is_named(installed):
    installed("[fmd_ext.models]\nduo = duo_fmd:Gone\n")
    with pytest.raises(ImportError, match="duo_fmd:Gone, which loads duo, cannot be imported: "):
        class_for({"model_type": "duo"})


@pytest.fixture
def checkpoint(tmp_path, model):
    """A folder as published: weights, tokenizer, and the code that runs them."""
    folder = tmp_path / "checkpoint"
    byte_tokenizer().save_pretrained(folder)
    mapped = {"AutoConfig": "modeling_duo.DuoConfig", "AutoModel": "modeling_duo.DuoModel"}
    config = {"model_type": "duo", "architectures": ["DuoModel"], "auto_map": mapped, "text_config": TEXT}
    (folder / "config.json").write_text(json.dumps(config))
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    shutil.copy(CODE / "modeling_duo.py", folder)
    return folder


def test_verify_and_ask_take_a_checkpoint_with_code_of_its_own(checkpoint, installed, tmp_path):
    """In a process of their own, which knows neither the model nor the adapter but for the installed package."""
    site = installed(BOTH)
    path = str(write_clip(tmp_path / "clip.mp4", seconds=2.0))
    cache = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join((str(site), str(ROOT))),
    }

    def fmd(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "fmd_ext", *arguments, "--model", str(checkpoint), "--max-new-tokens", "4"],
            env={**os.environ, **cache, **environment},
            capture_output=True,
            text=True,
        )

    said = fmd("verify", path, "--fork-layers", "2")
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("equal") >= 2 and "DIFFERENT" not in said.stdout
    said = fmd("ask", path, "What is that?", "--fork-layers", "2", "--compare")
    assert said.returncode == 0, said.stderr
    assert "2 of 4 layers forked" in said.stdout
    said = fmd("verify", path, PYTHONPATH=str(ROOT))
    assert said.returncode == 2 and "is of type 'duo'; supported types are qwen2_5_omni" in said.stderr
