"""A random Qwen3-Omni of a few megabytes in vLLM: experts, normed heads, features added after the first layers."""

from __future__ import annotations

import json

import pytest
import torch

from served import BOTH_MODALITIES, ONE_MODALITY, SETTINGS, Library, answers, greedy, start, tokens

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")

from fmd_ext.lab.tiny import save_random_model  # noqa: E402
from fmd_ext.lab.tiny.qwen3_omni import PATCH_SIZE  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402

FRAMES = {"shortest_edge": 9216, "longest_edge": 9216}  # 96 x 96 pixels: nine tokens for two frames
ALL = {**ONE_MODALITY, **BOTH_MODALITIES}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("thinker"), family="qwen3_omni")


@pytest.fixture(scope="module")
def outputs(thinker, tmp_path_factory):
    folder = write_full_model(thinker, tmp_path_factory.mktemp("full"))
    config = json.loads((folder / "config.json").read_text())
    # Published configurations still have these entries, and vLLM reads them; transformers drops them.
    config["thinker_config"]["vision_config"].update(image_size=8 * PATCH_SIZE, apply_vit_abs_pos_embed=True)
    config["thinker_config"]["text_config"]["rope_parameters"]["mrope_interleaved"] = True
    (folder / "config.json").write_text(json.dumps(config))
    engine = start(
        folder,
        settings=SETTINGS,
        architecture="Qwen3OmniMoeForConditionalGeneration",
        frames=FRAMES,
        max_num_batched_tokens=48,
    )
    found = answers(engine, [ask.prompt() for ask in ALL.values()], greedy(logprobs=5))
    return dict(zip(ALL, found, strict=True))


@pytest.fixture(scope="module")
def library(thinker):
    return Library(SETTINGS, thinker, FRAMES)


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens_are_the_librarys(name, outputs, library):
    expected, logprobs = library.answer(ALL[name])
    for token, found in outputs[name].outputs[0].logprobs[0].items():
        assert found.logprob == pytest.approx(logprobs[token].item(), abs=1e-3)
    assert tokens([outputs[name]]) == [expected]


def test_experts_are_told_of_padding_in_both_branches():
    """On a GPU, where a step is padded to the size of a graph: a mask of one branch would be read beyond its end."""
    from fmd_ext.serve.qwen3_omni import FMDQwen3OmniMoeForConditionalGeneration

    model = FMDQwen3OmniMoeForConditionalGeneration.__new__(FMDQwen3OmniMoeForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.register_buffer("both_paddings", torch.zeros(16, dtype=torch.bool))
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in ([0, 0, 1], [0, 1, 1, 1, 1])]
    places = set()
    for mask in masks:
        both = model._paddings_of_both(mask)
        assert both.tolist() == mask.tolist() * 2
        places.add(both.data_ptr())
    assert len(places) == 1 and model._paddings_of_both(None) is None
