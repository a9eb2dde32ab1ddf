"""Which checkpoints the ports take: the official layout, what they save, holes, wrong shapes; where parts may lie."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import video_salmonn2_plus_recorded as plus
import video_salmonn2_recorded as salmonn2
import video_salmonn_files as salmonn
import videollama2_recorded as videollama2
from fmd_ext.models.video_salmonn import VideoSalmonnConfig, VideoSalmonnForConditionalGeneration
from fmd_ext.models.video_salmonn.checkpoint import our_names
from fmd_ext.models.video_salmonn2 import VideoSalmonn2ForConditionalGeneration
from fmd_ext.models.video_salmonn2_plus import (
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusProcessor,
)
from fmd_ext.models.video_salmonn2_plus.checkpoint import our_name as plus_name
from fmd_ext.models.videollama2 import (
    VideoLlama2MistralForConditionalGeneration,
    VideoLlama2Qwen2Config,
    VideoLlama2Qwen2ForConditionalGeneration,
)

UNUSED = "speech_Qformer.bert.embeddings.position_ids"
AUTO = (AutoModelForCausalLM, AutoModelForImageTextToText)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A port's official layout, small, and the recording of its last logits.

    Args:
        loaders: classes whose ``from_pretrained`` read the official folder.
        write: (folder, state, **settings of config.json) -> folder.
        state: official tensors by name.
        renamed: an official name -> ours; None for what the port has no use for.
        inputs: of the recorded call.
        logits: (the call's logits) -> those that were recorded.
        fetched, at_hand: parts of the model that lie on disk and in memory; one parameter of those on disk.
    """

    name: str
    model_class: type
    loaders: tuple[Any, ...]
    write: Callable[..., Any]
    state: Callable[[], dict[str, torch.Tensor]]
    renamed: Callable[[str], str | None]
    inputs: Callable[[Any], dict[str, Any]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    recorded: np.ndarray
    fetched: tuple[str, ...]
    at_hand: tuple[str, ...]
    on_disk: str

    def __str__(self) -> str:
        return self.name

    def load(self, folder, **options):
        return self.loaders[0].from_pretrained(folder, **options)

    def call(self, model):
        return self.logits(model(**self.inputs(model)).logits)


def _videollama2_name(name: str) -> str | None:
    """SigLIP was once one level deeper, its head is left out, and every BEATs layer repeats the first one's table."""
    if ".vision_model.head." in name or ("relative_attention_bias" in name and ".layers.0." not in name):
        return None
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def _videollama2(kind: str, model_class: type) -> Checkpoint:
    return Checkpoint(
        f"videollama2_{kind}",
        model_class,
        AUTO,
        lambda folder, state=None, **settings: videollama2.write_official_folder(folder, kind, state, **settings),
        lambda: videollama2.official_state(kind),
        _videollama2_name,
        lambda model: videollama2.recorded_inputs(model, kind),
        lambda logits: logits[0, -30:],
        videollama2.RECORDED[f"{kind}_logits"],
        ("model.vision_tower", "model.mm_projector", "model.audio_tower", "model.mm_projector_a"),
        ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"),
        "model.audio_tower.encoder.layers.0.fc1.weight",
    )


SALMONN2 = Checkpoint(
    "video_salmonn2",
    VideoSalmonn2ForConditionalGeneration,
    AUTO,
    salmonn2.write_official_folder,
    salmonn2.official_state,
    lambda name: None if name == UNUSED else name.replace("vision_tower.vision_model.", "vision_tower."),
    lambda model: salmonn2.recorded_inputs(model.config, "short"),
    lambda logits: logits[0, -6:],
    salmonn2.RECORDED["short_logits"],
    ("model.vision_tower", "model.mm_projector", "speech_encoder", "ln_speech", "speech_Qformer"),
    ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "model.image_newline", "lm_head")
    + ("speech_query_tokens", "speech_llama_proj", "final_linear"),
    "speech_encoder.layers.0.fc1.weight",
)
PLUS = Checkpoint(
    "video_salmonn2_plus",
    VideoSalmonn2PlusForConditionalGeneration,
    (VideoSalmonn2PlusForConditionalGeneration,),
    plus.write_official_folder,
    plus.official_state,
    lambda name: None if name == plus.BUFFER else plus_name(name),
    lambda model: plus.recorded_inputs("one"),
    lambda logits: logits[0, -16:],
    plus.RECORDED["one_logits"],
    ("model.visual", "model.audio"),
    ("model.language_model", "lm_head"),
    "model.audio.conv1.weight",
)
QWEN2 = _videollama2("qwen2", VideoLlama2Qwen2ForConditionalGeneration)
MISTRAL = _videollama2("mistral", VideoLlama2MistralForConditionalGeneration)
CHECKPOINTS = (QWEN2, MISTRAL, SALMONN2, PLUS)
each = pytest.mark.parametrize("port", CHECKPOINTS, ids=str)
# Of VideoLLaMA2's two forms, one where the other differs in nothing that the test is about.
one_form = pytest.mark.parametrize("port", (QWEN2, SALMONN2, PLUS), ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("official")
    return {port.name: port.write(base / port.name) for port in CHECKPOINTS}


@pytest.fixture(scope="module")
def models(folders):
    return {port.name: port.load(folders[port.name]) for port in CHECKPOINTS}


def close(ours, official, atol=1e-4):
    assert tuple(ours.shape) == official.shape
    np.testing.assert_allclose(ours.float().numpy(), official, atol=atol, rtol=0)


@each
def test_an_official_folder_loads_whole(port, folders):
    """Every tensor is there, under our name, with its values."""
    official = {port.renamed(name): tensor for name, tensor in port.state().items() if port.renamed(name)}
    for loader in port.loaders:
        model, report = loader.from_pretrained(folders[port.name], output_loading_info=True)
        assert type(model) is port.model_class
        assert not report["missing_keys"] and not report["unexpected_keys"]
        ours = model.state_dict()
        assert ours.keys() == official.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in official.items())
    if port is PLUS:  # of the official folder; it names Qwen2.5-VL's, which AutoProcessor would make
        assert type(VideoSalmonn2PlusProcessor.from_pretrained(folders[port.name])) is VideoSalmonn2PlusProcessor


@each
def test_a_saved_folder_has_the_official_names(port, models, folders, tmp_path):
    model = models[port.name]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {name: list(tensor.shape) for name, tensor in port.state().items() if port.renamed(name)}
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == kept
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == port.model_class.config_class.model_type
    assert port not in (QWEN2, MISTRAL) or config["hidden_size"] == 64  # the decoder's settings lie flat
    for auto in AUTO:
        again = auto.from_pretrained(tmp_path)
        assert type(again) is port.model_class and torch.equal(port.call(again), port.call(model))
    if port is PLUS:  # the official folder's processor is not found by itself, the saved one's is
        VideoSalmonn2PlusProcessor.from_pretrained(folders[port.name]).save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert type(processor) is VideoSalmonn2PlusProcessor and processor.tokens_per_window == 60


@pytest.mark.parametrize(
    "port, gone, named",
    [
        (QWEN2, "model.mm_projector.readout.0.weight", r"1 tensors: model.mm_projector.readout.0.weight"),
        (QWEN2, "model.audio_tower.", r"\d+ tensors: model.audio_tower.encoder.layer_norm.bias, "),
        (QWEN2, "model.vision_tower.", r"\d+ tensors: model.vision_tower.vision_tower.embeddings"),
        (SALMONN2, "model.image_newline", "1 tensors: model.image_newline"),
        (SALMONN2, "speech_Qformer.", r"\d+ tensors: speech_Qformer.bert.embeddings.LayerNorm"),
        (SALMONN2, "model.vision_tower.", r"\d+ tensors: model.vision_tower.vision_tower.embeddings"),
        # Such as a plain Qwen2.5-VL, which lacks what is called audio.
        (PLUS, "audio.", r"\d+ tensors: model.audio.audio_proj.bias, .* and \d+ more"),
        (PLUS, "audio.q_tokens", "1 tensors: model.audio.q_tokens"),
        (PLUS, "model.layers.2.", r"\d+ tensors: model.language_model.layers.2.input_layernorm.weight"),
    ],
    ids=str,
)
def test_a_partial_checkpoint_is_refused_by_name(tmp_path, port, gone, named):
    state = {name: tensor for name, tensor in port.state().items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match=f"is no complete {port.model_class.__name__}: it lacks {named}"):
        port.load(port.write(tmp_path / "partial", state))


@one_form
def test_another_models_checkpoint_is_refused_by_name(tmp_path, port):
    folder = port.write(tmp_path / "other", {"transformer.wte.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"lacks \d+ tensors.*; it holds 1 others, such as transformer.wte.weight"):
        port.load(folder)


@pytest.mark.parametrize(
    "port, tensors, settings, message",
    [
        (
            QWEN2,
            {"model.mm_projector_a.0.weight": torch.zeros(64, 40)},
            {},
            r"of 1 tensors: model.mm_projector_a.0.weight is \[64, 40\] instead of \[64, 48\]",
        ),
        (
            SALMONN2,
            {},
            {"mm_spatial_pool_mode": "max", "num_speech_query_token": 2},
            r"speech_query_tokens is \[1, 1, 32\] instead of \[1, 2, 32\]",
        ),
        (
            PLUS,
            {"audio.audio_proj.bias": torch.zeros(60)},
            {},
            r"model.audio.audio_proj.bias is \[60\] instead of \[64\]",
        ),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path, port, tensors, settings, message):
    folder = port.write(tmp_path / "unfit", {**port.state(), **tensors}, **settings)
    with pytest.raises(ValueError, match=message):
        port.load(folder)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
@one_form
def test_low_precision_stays_near(port, folders, dtype, bound):
    logits = port.call(port.load(folders[port.name], dtype=dtype))
    assert logits.dtype == dtype
    close(logits, port.recorded, atol=bound)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # some are parameters, not modules
@one_form
def test_parts_fetched_from_disk_when_they_are_needed(port, folders, tmp_path):
    """accelerate's device_map: each part may lie elsewhere."""
    places = dict.fromkeys(port.fetched, "disk") | dict.fromkeys(port.at_hand, "cpu")
    model = port.load(folders[port.name], device_map=places, offload_folder=tmp_path)
    assert model.get_parameter(port.on_disk).device.type == "meta"
    close(port.call(model), port.recorded)


# --- full size --------------------------------------------------------------------------------------------------------


def unrolled(recorded: str) -> dict[str, list[int]]:
    """Shapes by name; a recording holds ``layers.#`` once, with the range of layers."""
    shapes = {}
    for name, (shape, layers) in json.loads(recorded).items():
        for layer in [None] if layers is None else range(*layers):
            shapes[name.replace("#", str(layer))] = shape
    return shapes


def _published(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "model_type"}


@pytest.mark.parametrize(
    "port, config, official, left_out, tokens",
    [
        # The tables of BEATs' other layers, SigLIP's head.
        (
            QWEN2,
            lambda: VideoLlama2Qwen2Config(**_published(videollama2.PUBLISHED)),
            lambda: videollama2.FULL_NAMES,
            11 + 11,
            lambda c: (c.num_video_tokens, c.num_audio_tokens(2998)) == (1352, 1496),
        ),
        (
            SALMONN2,
            lambda: AutoConfig.for_model(**salmonn2.PUBLISHED),
            lambda: unrolled(str(salmonn2.RECORDED["full_parameters"])),
            1,
            lambda c: (c.num_frame_tokens, c.num_sound_tokens) == (182, 60),
        ),
        (
            PLUS,
            lambda: VideoSalmonn2PlusConfig.from_dict(_published(plus.FULL)),
            lambda: plus.FULL_NAMES,
            1,
            lambda c: (c.audio_config.num_tokens, c.mrope_positions) == (60, "inference"),
        ),
    ],
    ids=["videollama2", "video_salmonn2", "video_salmonn2_plus"],
)
def test_the_published_shape_has_the_official_names_and_shapes(port, config, official, left_out, tokens):
    """The 7B model at full size, without memory, by what its configuration says; against the official model."""
    config, shapes = config(), official()
    assert tokens(config)
    with torch.device("meta"):
        model = port.model_class(config)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {port.renamed(name): shape for name, shape in shapes.items() if port.renamed(name)}
    assert len(shapes) - len(ours) == left_out
    assert port is not SALMONN2 or shapes[UNUSED] == [1, 512]


def test_the_published_video_salmonn_has_the_official_names_and_shapes():
    """Likewise; its files hold LoRA weights beside the decoder's."""
    config = VideoSalmonnConfig()
    with torch.device("meta"):
        ours = VideoSalmonnForConditionalGeneration(config).state_dict()
        official = {n: torch.empty(s) for n, s in unrolled(str(salmonn.RECORDED["full_parameters"])).items()}
        named = our_names(official, config.vision_config.num_hidden_layers)
    lora = {name: tuple(tensor.shape) for name, tensor in named.items() if ".lora_" in name}
    assert len(lora) == 40 * 4 * 2 and set(lora.values()) == {(32, 5120), (5120, 32)}
    expected = {name: tuple(tensor.shape) for name, tensor in named.items() if name not in lora}
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == expected
    assert (config.audio_frames, config.num_fine_queries) == (60, 3)
    assert config.num_tokens(120, True) == 360 and config.num_tokens(7, False) == 30
