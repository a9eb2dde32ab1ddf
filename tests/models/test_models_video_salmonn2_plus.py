"""The video-SALMONN 2+ port against recordings of the official code, and which checkpoints it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmd_ext.models.video_salmonn2_plus import (
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    merge_adapter,
)
from video_salmonn2_plus_recorded import (
    ADAPTER_NAMES,
    CASES,
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


def test_a_head_that_is_tied_to_the_embeddings_need_not_be_there(tmp_path):
    """As in the 3B model; one that is not tied must."""
    state = {name: tensor for name, tensor in official_state().items() if name != "lm_head.weight"}
    folder = write_official_folder(tmp_path / "tied", state, tie_word_embeddings=True)
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(folder)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    with pytest.raises(ValueError, match="lacks 1 tensors: lm_head.weight"):
        VideoSalmonn2PlusForConditionalGeneration.from_pretrained(write_official_folder(tmp_path / "torn", state))


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


def test_an_adapter_is_merged_into_a_model_in_memory(folder, tmp_path):
    places = {"model.visual": "disk", "model.audio": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path
    )
    with pytest.raises(ValueError, match="is merged into a model in memory"):
        merge_adapter(model, write_official_adapter(tmp_path / "adapter"))
