"""Which class loads a checkpoint, by its config.json."""

from __future__ import annotations

import importlib.util
import json

import pytest

from fmd_ext.adapters import ADAPTERS
from fmd_ext.models.classes import MODEL_CLASSES, class_for, read_config


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_a_class_that_we_load_is_one_that_we_can_patch(kind):
    model_class = class_for({"model_type": kind})
    served = {model_type for adapter in ADAPTERS.values() for model_type in adapter.model_types}
    assert model_class.config_class.model_type in served and hasattr(model_class, "from_pretrained")


def test_the_architecture_wins_over_a_borrowed_type():
    """Published video-SALMONN 2+ calls itself qwen2_5_vl, which would not hear."""
    config = {"architectures": ["video_SALMONN2_plus"], "model_type": "qwen2_5_vl"}
    assert class_for(config).__name__ == "VideoSalmonn2PlusForConditionalGeneration"


def test_other_types_are_refused_with_a_list():
    with pytest.raises(ValueError, match="it is of type 'llama'; supported types are qwen2_5_omni, qwen2_5_omni_th"):
        class_for({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    with pytest.raises(ValueError, match="it is of type None; supported types are"):
        class_for({})


def test_without_torchvision_the_omni_models_name_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else found(name))
    with pytest.raises(ImportError, match="torchvision, which is not installed: pip install"):
        class_for({"model_type": "qwen2_5_omni"})
    assert class_for({"model_type": "video_salmonn_2"}).__name__ == "VideoSalmonn2ForConditionalGeneration"


def test_reading_a_config_runs_no_code_that_a_checkpoint_brings(tmp_path):
    (tmp_path / "modeling.py").write_text("raise SystemExit('this code ran')\n")
    config = {"model_type": "other", "auto_map": {"AutoConfig": "modeling.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(str(tmp_path))["model_type"] == "other"
