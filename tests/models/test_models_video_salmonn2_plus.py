"""The video-SALMONN 2+ port against recordings of the official code, and which checkpoints it takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from fmd_ext.models.video_salmonn2_plus import (
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusProcessor,
    merge_adapter,
)
from fmd_ext.models.video_salmonn2_plus.checkpoint import our_name
from video_salmonn2_plus_recorded import (
    ADAPTER_NAMES,
    BUFFER,
    CASES,
    FULL,
    FULL_NAMES,
    NAMES,
    RECORDED,
    SMALL,
    official_state,
    recorded_inputs,
    repeated,
    sound_windows,
    write_official_adapter,
    write_official_folder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_official_folder(tmp_path_factory.mktemp("video_salmonn2_plus") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(params=["inference", "training"])
def counting(model, request):
    """The model, and the way in which it counts positions."""
    model.config.mrope_positions = request.param
    yield model, request.param
    model.config.mrope_positions = "inference"


def close(ours, official):
    assert tuple(ours.shape) == official.shape
    np.testing.assert_allclose(ours.numpy(), official, atol=1e-4, rtol=0)


def test_tokens_of_sound_and_picture_equal_the_official_ones(model):
    close(model.model.audio(sound_windows(2)[0])[:, ::3], RECORDED["sound"])
    inputs = recorded_inputs("one")
    picture = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    close(torch.cat(list(picture)), RECORDED["picture"])


@pytest.mark.parametrize("case", [*CASES, "two"])
def test_positions_equal_the_official_ones(counting, case):
    model, scheme = counting
    if case == "two":  # clips in one prompt
        ids = torch.from_numpy(repeated(RECORDED["two_ids"]).astype(np.int64))[None]
        grids = {"video_grid_thw": torch.tensor([[3, 4, 6], [2, 4, 4]]), "second_per_grid_ts": torch.tensor([1.5, 2.5])}
        inputs = {"input_ids": ids, **grids}
    else:
        inputs = recorded_inputs(case)
    positions, deltas = model.model.get_rope_index(**inputs)
    official = RECORDED[f"{case}_{scheme}"]
    assert positions[:, 0].tolist() == official.tolist()
    assert deltas.tolist() == [[official.max() + 1 - official.shape[1]]]


def test_positions_of_an_image_before_a_clip_equal_the_official_ones(model):
    ids = torch.from_numpy(repeated(RECORDED["image_ids"]).astype(np.int64))[None]
    grids = {"image_grid_thw": torch.tensor([[1, 4, 6]]), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    assert model.model.get_rope_index(ids, **grids)[0][:, 0].tolist() == RECORDED["image_inference"].tolist()


@pytest.mark.parametrize(
    "grids, message",
    [
        ([[3, 4, 6], [40, 4, 4]], "more tokens than the prompt"),
        ([[3, 4, 6]], "more images and videos than there are"),
    ],
)
def test_grids_that_do_not_match_the_prompt_are_refused(model, grids, message):
    ids = torch.from_numpy(repeated(RECORDED["two_ids"]).astype(np.int64))[None]
    with pytest.raises(ValueError, match=message):
        model.model.get_rope_index(ids, video_grid_thw=torch.tensor(grids))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_official_ones(counting, case):
    model, scheme = counting
    kind = "" if scheme == "inference" else "training_"
    close(model(**recorded_inputs(case)).logits[0, -16:], RECORDED[f"{case}_{kind}logits"])


@pytest.mark.parametrize("case", CASES)
def test_generate_answers_as_the_official_code(model, case):
    inputs = recorded_inputs(case)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = model.generate(**inputs, **options)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == RECORDED[f"{case}_answer"].tolist()
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), ids)


def test_a_text_after_a_clip_starts_counting_anew(model):
    model(**recorded_inputs("one"))
    ids = torch.arange(20, 40)[None]
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    onward = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(onward, model(input_ids=ids).logits[:, -1], atol=1e-4, rtol=0)


def test_the_published_shape_has_the_official_names_and_shapes():
    """The 7B model at full size, without memory, by what its configuration says; against the official model.

    Three rules bring official names to ours, which the tests of loading and saving show at work.
    """
    config = VideoSalmonn2PlusConfig.from_dict({k: v for k, v in FULL.items() if k != "model_type"})
    assert config.audio_config.num_tokens == 60 and config.mrope_positions == "inference"
    with torch.device("meta"):
        model = VideoSalmonn2PlusForConditionalGeneration(config)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {our_name(name): shape for name, shape in FULL_NAMES.items() if name != BUFFER}


def test_an_official_folder_loads_whole(folder):
    model, report = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, official = model.state_dict(), official_state()
    assert ours.keys() == {our_name(name) for name in official if name != BUFFER}
    assert all(torch.equal(ours[our_name(name)], tensor) for name, tensor in official.items() if name != BUFFER)
    assert type(VideoSalmonn2PlusProcessor.from_pretrained(folder)) is VideoSalmonn2PlusProcessor


def test_a_head_that_is_tied_to_the_embeddings_need_not_be_there(tmp_path):
    """As in the 3B model; one that is not tied must."""
    state = {name: tensor for name, tensor in official_state().items() if name != "lm_head.weight"}
    folder = write_official_folder(tmp_path / "tied", state, tie_word_embeddings=True)
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    with pytest.raises(ValueError, match="lacks 1 tensors: lm_head.weight"):
        VideoSalmonn2PlusForConditionalGeneration.from_pretrained(write_official_folder(tmp_path / "torn", state))


def test_a_saved_folder_has_the_official_names_and_is_known_to_the_auto_classes(model, folder, tmp_path):
    model.save_pretrained(tmp_path)
    VideoSalmonn2PlusProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: shape for name, shape in NAMES.items() if name != BUFFER}
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == expected
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "video_salmonn2_plus"
    inputs = recorded_inputs("one")
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is type(model) and torch.equal(again(**inputs).logits, model(**inputs).logits)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is VideoSalmonn2PlusProcessor and processor.tokens_per_window == 60


@pytest.mark.parametrize(
    "gone, named",
    [
        ("audio.q_tokens", r"lacks 1 tensors: model.audio.q_tokens"),
        ("audio.", r"lacks \d+ tensors: model.audio.audio_proj.bias, .* and \d+ more"),
        ("model.layers.2.", r"lacks \d+ tensors: model.language_model.layers.2.input_layernorm.weight"),
    ],
)
def test_a_partial_checkpoint_is_refused_by_name(tmp_path, gone, named):
    """Also a plain Qwen2.5-VL, which lacks what is called audio."""
    state = {name: tensor for name, tensor in official_state().items() if not name.startswith(gone)}
    folder = write_official_folder(tmp_path / "partial", state)
    with pytest.raises(ValueError, match="is no complete VideoSalmonn2PlusForConditionalGeneration: it " + named):
        VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder)


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    folder = write_official_folder(tmp_path / "unfit", {**official_state(), "audio.audio_proj.bias": torch.zeros(60)})
    with pytest.raises(ValueError, match=r"model.audio.audio_proj.bias is \[60\] instead of \[64\]"):
        VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder)


def test_an_adapter_merges_as_in_the_official_code(folder, tmp_path):
    """LoRA, and the parts that the official training saves whole beside it."""
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder)
    merge_adapter(model, write_official_adapter(tmp_path / "adapter"))
    close(model(**recorded_inputs("one")).logits[0, -16:], RECORDED["adapted_logits"])


HALF = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"


@pytest.mark.parametrize(
    "names, settings, message",
    [
        ({n: s for n, s in ADAPTER_NAMES.items() if n != HALF}, {}, r"lacks LoRA weights: .*layers.1.*k_proj.lora_B"),
        ({n: s for n, s in ADAPTER_NAMES.items() if ".lora_" not in n}, {}, "lacks LoRA weights: it has none"),
        ({**ADAPTER_NAMES, HALF.replace("layers.1.", "layers.9."): [32, 4]}, {}, "does not fit .* layers.9.self_attn"),
        (
            {**ADAPTER_NAMES, "base_model.model.audio.audio_proj.bias": [3]},
            {},
            "1 tensors: model.audio.audio_proj.b",
        ),
        (ADAPTER_NAMES, {"use_dora": True}, "another adapter than plain LoRA: LORA, use_dora"),
        (ADAPTER_NAMES, {"peft_type": "IA3"}, "another adapter than plain LoRA: IA3"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(model, tmp_path, names, settings, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message.replace(" .* ", ".*")):
        merge_adapter(model, write_official_adapter(tmp_path / "adapter", names, **settings))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_features_that_do_not_match_the_prompt_are_refused(model):
    inputs = recorded_inputs("one")
    with pytest.raises(ValueError, match=r"hold \[60\] tokens of sound, input_features 1 windows for each of 2"):
        model(**{**inputs, "input_features": sound_windows(1).expand(2, -1, -1, -1)})
    with pytest.raises(ValueError, match=r"hold \[120\] tokens of sound, input_features 1 windows"):
        model(**{**recorded_inputs("long"), "input_features": sound_windows(1)})
    with pytest.raises(ValueError, match="input_features need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64), input_features=sound_windows(1))


def test_an_unknown_way_to_count_positions_is_refused():
    with pytest.raises(ValueError, match="mrope_positions 'both': accepted are inference, training"):
        VideoSalmonn2PlusConfig.from_dict({**SMALL, "mrope_positions": "both"})


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
def test_low_precision_stays_near(folder, dtype, bound):
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    logits = model(**recorded_inputs("one")).logits
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits[0, -16:].float().numpy(), RECORDED["one_logits"], atol=bound, rtol=0)


def test_encoders_fetched_from_disk_when_they_are_needed(folder, tmp_path):
    """accelerate's device_map: each part may lie elsewhere."""
    fetched = ("model.visual", "model.audio")
    at_hand = ("model.language_model", "lm_head")
    places = dict.fromkeys(fetched, "disk") | dict.fromkeys(at_hand, "cpu")
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path
    )
    assert model.model.audio.conv1.weight.device.type == "meta"
    close(model(**recorded_inputs("one")).logits[0, -16:], RECORDED["one_logits"])
    with pytest.raises(ValueError, match="is merged into a model in memory"):
        merge_adapter(model, write_official_adapter(tmp_path / "adapter"))
