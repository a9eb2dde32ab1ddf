"""A thinker's folder as that of a full model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fmd_ext.lab.tiny import save_random_model
from fmd_ext.lab.trained import MODEL
from fmd_ext.serve.folder import is_thinker, write_full_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_full_model(MODEL, tmp_path_factory.mktemp("full"))


def test_what_is_a_thinker(written, tmp_path):
    assert is_thinker(MODEL)
    assert not is_thinker(written) and not is_thinker(tmp_path) and not is_thinker("owner/name")


def test_transformers_loads_the_thinker_out_of_it(written):
    whole = transformers.Qwen2_5OmniForConditionalGeneration
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    config = json.loads((written / "config.json").read_text())
    assert config["architectures"] == [whole.__name__] and config["model_type"] == "qwen2_5_omni"
    (there, report), source = thinker.from_pretrained(written, output_loading_info=True), thinker.from_pretrained(MODEL)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    copied = there.state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(copied[name][: len(tensor)] if tensor.dim() else copied[name], tensor), name


def test_three_rows_are_added_where_the_tokenizer_leaves_none(written):
    own = json.loads((MODEL / "config.json").read_text())["text_config"]["vocab_size"]
    for name in ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"):
        rows = load_file(written / "model.safetensors")[name]
        assert len(rows) == own + 3 and not rows[own:].any() and rows[own - 1].any()
    assert json.loads((written / "config.json").read_text())["thinker_config"]["text_config"]["vocab_size"] == own + 3


def test_no_row_is_added_where_three_are_left(tmp_path):
    source = save_random_model(tmp_path / "thinker", vocab_size=400)
    written = write_full_model(source, tmp_path / "full")
    assert json.loads((written / "config.json").read_text())["thinker_config"]["text_config"]["vocab_size"] == 400


def test_other_folders_are_refused(written, tmp_path):
    with pytest.raises(ValueError, match="is of type 'qwen2_5_omni'; accepted are qwen2_5_omni_thinker"):
        write_full_model(written, tmp_path)
    with pytest.raises(FileNotFoundError):
        write_full_model(tmp_path / "nothing", tmp_path)
