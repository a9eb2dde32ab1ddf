"""Weights in int8 with rows quantised one by one, keys and values in FP8 with a scale per layer, as a checkpoint has
them: the bundled model in that form, in plain vLLM and in ours."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from served import BOTH_MODALITIES, ONE_MODALITY, SETTINGS, Library, answers, greedy, start, tokens

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402

LAYERS = 6
SCALES = [(0.02 + 0.01 * layer, 0.1 + 0.01 * layer) for layer in range(LAYERS)]  # keys, values; all differ


def weights_of_8_bits() -> dict:
    """As compressed-tensors writes it down: of the decoder's layers alone."""
    bits = {"num_bits": 8, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**bits, "type": "int", "strategy": "channel", "dynamic": False},
                "input_activations": {**bits, "type": "int", "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["re:.*lm_head", "re:.*visual.*", "re:.*audio_tower.*"],
        "kv_cache_scheme": {**bits, "type": "float", "strategy": "tensor", "dynamic": False},
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``quantised``: for vLLM; ``usual``: a thinker of the same weights in float32, for the library."""
    quantised = write_full_model(MODEL, tmp_path_factory.mktemp("quantised"))
    usual = tmp_path_factory.mktemp("usual")
    for file in MODEL.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (usual / file.name).write_bytes(file.read_bytes())
    written = load_file(quantised / "model.safetensors")
    back = {name: tensor for file in MODEL.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, weight in list(written.items()):
        if name.startswith("thinker.model.layers.") and name.endswith("proj.weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            written[name] = torch.round(weight.float() / scale).to(torch.int8)
            written[f"{name}_scale"] = scale
            back[name.removeprefix("thinker.")] = written[name].float() * scale
    for layer, (keys, values) in enumerate(SCALES):
        written[f"thinker.model.layers.{layer}.self_attn.k_scale"] = torch.tensor(keys)
        written[f"thinker.model.layers.{layer}.self_attn.v_scale"] = torch.tensor(values)
    save_file(written, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(back, usual / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = weights_of_8_bits()
    (quantised / "config.json").write_text(json.dumps(config))
    return {"quantised": quantised, "usual": usual}


@pytest.fixture(scope="module")
def engines(folders):
    options = {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}  # what the products of vLLM on a CPU take
    return {
        "plain": start(folders["quantised"], plain=True, **options),
        "ours": start(folders["quantised"], settings=SETTINGS, **options),
    }


def layers_of(engine):
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return runner.compilation_config.static_forward_context


def test_both_branches_have_the_scales_of_the_checkpoint(engines):
    found = {}
    for name, layer in layers_of(engines["ours"]).items():
        assert layer.kv_cache_dtype == "fp8" and layer.kv_cache.element_size() == 1
        index = int(name.partition("layers.")[2].partition(".")[0])
        found.setdefault(index, []).append((layer._k_scale_float, layer._v_scale_float))
    for index, scales in found.items():
        assert len(scales) == (2 if index < SETTINGS["fork_layers"] else 1)
        assert all(scale == pytest.approx(SCALES[index]) for scale in scales)
    assert len(found) == LAYERS
    assert layers_of(engines["plain"]).keys() < layers_of(engines["ours"]).keys()


def test_what_masks_nothing_is_answered_as_by_plain_vllm(engines):
    asks = list(ONE_MODALITY.values())
    prompts = [ask.prompt() for ask in asks]
    ours, plain = (tokens(answers(engines[name], prompts, greedy(16))) for name in ("ours", "plain"))
    assert ours == plain


def test_forked_requests_lose_no_more_than_plain_ones(engines, folders):
    """Against the library with the same weights in float32: what rounding rows, keys and values changes."""

    def errors(engine, library, **switch):
        asks = [ask for ask in BOTH_MODALITIES.values() if not ask.interleaved]
        outputs = answers(engine, [ask.prompt(**switch) for ask in asks], greedy(1, logprobs=5))
        found = []
        for ask, output in zip(asks, outputs, strict=True):
            expected = library.answer(ask, 1)[1]
            first = output.outputs[0].logprobs[0]
            found.append(max(abs(value.logprob - expected[token].item()) for token, value in first.items()))
        return torch.tensor(found)

    plain = errors(engines["plain"], Library(None, folders["usual"]))
    ours = errors(engines["ours"], Library(SETTINGS, folders["usual"]))
    unforked = errors(engines["ours"], Library(SETTINGS, folders["usual"]), fmd=False)
    assert 0 < plain.max() < 0.5, plain
    assert ours.max() <= 2 * plain.max(), (ours, plain)
    assert unforked.max() > 2 * plain.max(), "without the fork it would have passed, too"
