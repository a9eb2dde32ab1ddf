"""video-SALMONN's clips and prompts against the official code's, and its files: official, our own, faulty ones."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, WhisperFeatureExtractor

import fmd_ext.models
from fmd_ext.cli.main import main
from fmd_ext.inputs.chat import last_question_token, load_clip_for, prepare_batch, prepare_inputs
from fmd_ext.inputs.frames import each_second
from fmd_ext.inputs.media import Clip
from fmd_ext.inputs.sample_clip import write_clip
from fmd_ext.models.beats import fbank
from fmd_ext.models.video_salmonn import VideoSalmonnProcessor, load_official
from fmd_ext.models.video_salmonn.checkpoint import is_official_folder, official_processor
from video_salmonn_files import (
    LORA_ALPHA,
    RECORDED,
    tiny_config,
    tiny_model,
    tokenizer,
    write_official_folder,
)

QUESTION = "What is that sound ?"


@pytest.fixture(scope="module")
def processor():
    bert = tokenizer(51)
    bert.pad_token = "</s>"
    return VideoSalmonnProcessor.of_config(tiny_config(), WhisperFeatureExtractor(chunk_length=2), tokenizer(97), bert)


def clip(frames=5, samples=16000):
    picture = np.random.RandomState(1).randint(0, 256, (frames, 20, 30, 3), dtype=np.uint8) if frames else None
    sound = np.random.RandomState(2).standard_normal(samples).astype(np.float32) * 0.1 if samples else None
    return Clip(picture, 2.0, sound, 16000, 2.5)


# --- clips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample_demo_1", "sample_demo_9", "1034346401"])
def test_frames_are_those_of_the_official_sampling(name):
    """Recorded from three real clips, of 25, 23.976 and 29.97 frames per second: first and last of each second."""
    clip = json.loads(str(RECORDED["frame_numbers"]))[name]
    times = [Fraction(number) / Fraction(clip["fps"]) for number in range(clip["frames"])]
    found = []
    for start, end in each_second(Fraction(str(clip["duration"]))):
        inside = [number for number, time in enumerate(times) if start <= time < end]
        found += [inside[0], inside[-1]]
    assert found == clip["numbers"]


def test_frames_are_scaled_and_normalised_as_the_official_code_does(processor):
    frames = np.random.RandomState(3).randint(0, 256, (2, 36, 50, 3), dtype=np.uint8)
    full = VideoSalmonnProcessor(
        processor.feature_extractor, processor.tokenizer, processor.qformer_tokenizer, image_size=224
    )
    pixels = full.frame_pixels(frames)
    assert pixels.shape == (2, 3, 224, 224)
    np.testing.assert_allclose(pixels[:, :, ::28, ::28].numpy(), RECORDED["frame_pixels"], atol=1e-5, rtol=0)


def test_a_file_gives_two_frames_per_second(processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", seconds=2.5)
    assert len(load_clip_for(processor, path, fps=5.0, max_frames=1).frames) == 6


@pytest.mark.parametrize(
    "given,token,tokens",
    [({}, "joint", 30), ({"frames": 0}, "audio", 30), ({"samples": 0}, "video", 30), ({"frames": 11}, "joint", 60)],
)
def test_the_prompt_is_the_official_one(processor, given, token, tokens):
    """USER: <Img> tokens </Img> question ASSISTANT:, after the token that begins a text."""
    inputs = prepare_inputs(processor, clip(**given), QUESTION)
    placeholder = getattr(processor, f"{token}_token_id")
    before, after = (
        processor.tokenizer(text)["input_ids"] for text in ("USER: <Img>", f"</Img> {QUESTION} ASSISTANT:")
    )
    assert inputs["input_ids"][0].tolist() == [1, *before, *[placeholder] * tokens, *after]
    assert tokens == tiny_config().num_tokens(given.get("frames", 5), given.get("samples", 1) > 0)
    assert inputs["input_ids"][0, last_question_token(processor, QUESTION)] == processor.tokenizer("?")["input_ids"][0]


def test_of_a_long_question_its_end_steers_how_frames_are_read(processor, tmp_path):
    question = "Who sings " + "sound " * 600 + "?"
    processor.save_pretrained(tmp_path)
    ids = processor.qformer_tokenizer(question)["input_ids"]
    for own in (processor, AutoProcessor.from_pretrained(tmp_path)):
        inputs = prepare_inputs(own, clip(), question)
        assert inputs["qformer_input_ids"][0].tolist() == ids[-512:] != ids[:512]


def test_sound_is_padded_to_three_seconds_and_cut_at_whispers_window(processor):
    full = VideoSalmonnProcessor(WhisperFeatureExtractor(), processor.tokenizer, processor.qformer_tokenizer)
    short = clip(frames=0)
    inputs = prepare_inputs(full, short, QUESTION)
    padded = np.pad(short.audio, (0, 32000))
    assert inputs["input_features"].shape == (1, 80, 3000) and inputs["num_beats_frames"].tolist() == [298]
    torch.testing.assert_close(inputs["beats_features"][0], fbank(padded))
    long = clip(frames=0, samples=40000)
    with pytest.warns(UserWarning, match="hears only the first 2 s of 2.5 s"):
        inputs = prepare_inputs(processor, long, QUESTION)
    torch.testing.assert_close(inputs["beats_features"][0], fbank(long.audio[:32000]))


def test_batches_are_padded_and_equal_their_samples(processor):
    conversations = [([clip()], QUESTION), ([], "Who sings ?"), ([clip(frames=11, samples=0)], "Who is that ?")]
    batch = prepare_batch(processor, conversations)
    model = tiny_model()
    assert batch["num_frames"].tolist() == [5, 0, 11] and batch["num_beats_frames"].tolist() == [198, 0, 0]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for index, conversation in enumerate(conversations):
        one = prepare_batch(processor, [conversation])
        assert torch.equal(model.generate(**one, **options)[:, one["input_ids"].shape[1] :], tokens[index : index + 1])


@pytest.mark.parametrize(
    "clips,options,says",
    [
        ([clip(), clip()], {}, "about one clip, got 2"),
        ([clip()], {"use_audio_in_video": True}, "nothing to interleave"),
        ([clip()], {"system_prompt": "Be brief."}, "without a system prompt"),
        ([clip()], {"frame_pixels": (1, 2)}, "every frame to 28 pixels"),
        ([Clip(None, 2.0, np.zeros(9, np.float32), 8000, 1.0)], {}, "16000 samples per second, the clip has 8000"),
    ],
)
def test_what_the_processor_refuses(processor, clips, options, says):
    with pytest.raises(ValueError, match=says):
        prepare_inputs(processor, clips, QUESTION, **options)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "ckpt"
    write_official_folder(folder)
    return folder


def test_the_official_layout_loads_and_survives_saving(official, tmp_path):
    assert is_official_folder(official)
    model, processor = load_official(official, dtype=torch.float32, lora_alpha=LORA_ALPHA)
    expected = tiny_model().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0, msg=name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not is_official_folder(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = prepare_inputs(AutoProcessor.from_pretrained(tmp_path), clip(), QUESTION)
    assert torch.equal(again(**inputs).logits, model(**prepare_inputs(processor, clip(), QUESTION)).logits)


def test_accelerate_places_the_official_layout(official):
    pytest.importorskip("accelerate")
    model, processor = load_official(official, dtype=torch.float32, lora_alpha=LORA_ALPHA, device_map={"": "cpu"})
    inputs = prepare_inputs(processor, clip(), QUESTION)
    assert torch.equal(model(**inputs).logits, tiny_model()(**inputs).logits)


def test_the_command_line_answers_from_the_official_layout(official, tmp_path, capsys):
    path = write_clip(tmp_path / "clip.mp4", seconds=2.0)
    options = ["--model", str(official), "--dtype", "float32", "--max-new-tokens", "4", "--fork-layers", "2"]
    assert main(["ask", str(path), QUESTION, *options, "--compare", "--fps", "1"]) == 0
    out = capsys.readouterr()
    assert "first and the last frame of each second" in out.err
    assert out.out.strip()
    assert main(["verify", str(path), *options]) == 0
    out = capsys.readouterr().out
    assert "equal" in out and "attention" not in out  # the one masking that channel-wise fusion has


def test_without_sentencepiece_it_says_what_to_install(official, tmp_path, monkeypatch):
    spoil(official, tmp_path, "pretrained_ckpt/vicuna-13b-v1.5/tokenizer.json", None)
    (tmp_path / "pretrained_ckpt" / "vicuna-13b-v1.5" / "tokenizer.model").write_bytes(b"a SentencePiece model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fmd-ext\[video-salmonn\]'"):
        official_processor(tmp_path, tiny_config())


def spoil(official, folder, file, change):
    """A copy of the layout, by links, with one file changed, or left out when ``change`` is None."""
    for source in official.rglob("*"):
        target = folder / source.relative_to(official)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif source.relative_to(official).as_posix() != file:
            target.symlink_to(source)
        elif change is not None:
            content = torch.load(source, weights_only=True)
            change(content)
            torch.save(content, target)


OWN, BLIP = "MultiResQFormer/pytorch_model_4_5001.pt", "pretrained_ckpt/instruct_blip_vicuna13b_trimmed.pth"
LORA = "llama_model.base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight"


@pytest.mark.parametrize(
    "file,change,says",
    [
        (OWN, lambda c: c.pop("ln_video.bias"), "1 tensors are missing: joint_qformer.norm.bias"),
        (OWN, lambda c: c.update(odd=torch.zeros(1)), "1 tensors are unknown: odd"),
        (OWN, lambda c: c.pop(LORA), r"lacks LoRA weights: language_model.layers.3.self_attn.q_proj.lora_B$"),
        (OWN, lambda c: [c.pop(n) for n in list(c) if "lora" in n], "lacks LoRA weights: it has none"),
        (
            BLIP,
            lambda c: c.update(model={}),
            r"tensors are missing: query_tokens, vision_model.post_layernorm.weight, .* more",
        ),
        (
            BLIP,
            lambda c: c["model"].update(query_tokens=torch.zeros(1, 3, 24)),
            r"of another shape: query_tokens \[1, 3, 24\], expected \[1, 32, 24\]",
        ),
    ],
)
def test_partial_and_mismatched_files_are_refused_by_name(official, tmp_path, file, change, says):
    spoil(official, tmp_path, file, change)
    with pytest.raises(ValueError, match=says):
        load_official(tmp_path, dtype=torch.float32)


def test_a_missing_file_is_named(official, tmp_path, capsys):
    spoil(official, tmp_path, "pretrained_ckpt/eva_vit_g.pth", None)
    with pytest.raises(FileNotFoundError, match="must hold one file pretrained_ckpt/eva_vit_g.pth, it holds none"):
        load_official(tmp_path)
    path = write_clip(tmp_path / "clip.mp4", seconds=1.0)
    assert main(["ask", str(path), QUESTION, "--model", str(tmp_path)]) == 2
    assert "must hold one file pretrained_ckpt/eva_vit_g.pth" in capsys.readouterr().err


def test_other_names_of_shared_parts_are_understood():
    """The official model holds its joint Q-Former under three names; whichever a checkpoint uses."""
    names = fmd_ext.models.video_salmonn.checkpoint.our_names
    given = {"joint_Qformer.bert.encoder.layer.0.attention.self.query.weight": 1, "ln_speech.bias": 2}
    given |= {"llama_proj_joint.bias": 3, "joint_query_tokens": 4, "low_Qformer.bert.embeddings.LayerNorm.bias": 5}
    assert names(given, 2) == {
        "joint_qformer.layers.0.attention.attention.query.weight": 1,
        "joint_qformer.norm.bias": 2,
        "projector.bias": 3,
        "joint_qformer.query_tokens": 4,
    }
