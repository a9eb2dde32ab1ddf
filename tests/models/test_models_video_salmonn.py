"""The port of video-SALMONN against recordings of the official code; its branches, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fmd_ext
from fmd_ext.lab.baselines import avcd
from fmd_ext.models.beats import fbank
from fmd_ext.models.video_salmonn import VideoSalmonnConfig
from ports import VIDEO_SALMONN
from video_salmonn_files import RECORDED, tiny_config, tiny_model


@pytest.fixture(scope="module")
def _model():
    with torch.no_grad():
        return tiny_model()


@pytest.fixture
def model(_model):
    yield _model
    if fmd_ext.handle_of(_model) is not None:
        fmd_ext.unpatch(_model)


def recorded_inputs():
    """What the official code was given: frames, Whisper's log-mel window, the waveform."""
    generator = torch.Generator().manual_seed(11)
    frames = {count: torch.randn(count, 3, 28, 28, generator=generator) for count in (7, 13)}
    log_mel = torch.randn(80, 200, generator=generator)
    waveform = (torch.randn(31000, generator=generator) * 0.1).numpy()
    return frames, log_mel, waveform


def close(ours, name):
    assert list(ours.shape) == list(RECORDED[name].shape)
    np.testing.assert_allclose(ours.numpy(), RECORDED[name], atol=1e-4, rtol=0)


def encoded(model, count):
    frames, log_mel, waveform = recorded_inputs()
    video = model.encode_video(frames[count], torch.from_numpy(RECORDED["question_ids"]))
    return video, model.encode_audio(log_mel, fbank(waveform))


def test_encoders_equal_the_official_ones(model):
    frames, _, _ = recorded_inputs()
    close(model.vision_model(pixel_values=frames[7][:2]).last_hidden_state, "picture")
    video, audio = encoded(model, 7)
    close(video, "frame_tokens")
    close(audio.flatten(0, 1), "audio")


@pytest.mark.parametrize("count", [7, 13])
@pytest.mark.parametrize("case,scales", [("both", (1.0, 1.0)), ("visual", (1.0, 0.0)), ("audio", (0.0, 1.0))])
def test_tokens_equal_the_official_ones(model, count, case, scales):
    """With one group of frames and with two, unmasked and with either modality masked before the two are joined."""
    close(model._tokens(*encoded(model, count), (scales,))[0], f"tokens_{count}_{case}")


def test_tokens_of_one_modality_equal_the_official_ones(model):
    video, audio = encoded(model, 7)
    close(model._tokens(video, None, ((1.0, 1.0),))[0], "tokens_video_alone")
    close(model._tokens(None, audio, ((1.0, 1.0),))[0], "tokens_audio_alone")


def recorded_call(model):
    frames, log_mel, waveform = recorded_inputs()
    prompt, before = torch.from_numpy(RECORDED["prompt_ids"]), int(RECORDED["before"])
    placeholders = torch.full((model.config.num_tokens(13, True),), model.config.joint_token_id)
    sound = fbank(waveform)
    return {
        "input_ids": torch.cat([prompt[:before], placeholders, prompt[before:]])[None],
        "pixel_values": frames[13][None],
        "num_frames": torch.tensor([13]),
        "qformer_input_ids": torch.from_numpy(RECORDED["question_ids"])[None],
        "input_features": log_mel[None],
        "beats_features": sound[None],
        "num_beats_frames": torch.tensor([len(sound)]),
    }


def test_logits_and_greedy_tokens_equal_the_official_ones(model):
    """LoRA included: the official model runs it beside the decoder's weights, ours has it merged."""
    call = recorded_call(model)
    close(model(**call).logits[0], "logits")
    tokens = model.generate(**call, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens[0, call["input_ids"].shape[1] :].tolist() == RECORDED["generated"].tolist()


def test_avcd_refuses_tokens_that_mix_both_modalities(model):
    with avcd(model), pytest.raises(ValueError, match="joint ones"):
        model.generate(**recorded_call(model), max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_finite(dtype):
    """Thirteen frames leave seven fillers, whose fine groups are masked altogether."""
    model = tiny_model().to(dtype)
    call = recorded_call(model)
    logits = model(**call).logits
    assert logits.isfinite().all()
    assert np.abs(logits[0].float().numpy() - RECORDED["logits"]).max() < 0.1 * np.abs(RECORDED["logits"]).max()


# --- fork-merge decoding --------------------------------------------------------------------------------------------


def test_branches_are_the_official_masked_tokens(model):
    """The reference takes the branches from the model; here they are what the official code makes of masked inputs."""
    call = recorded_call(model)
    before = int(RECORDED["before"])
    branches = model.branch_inputs(0.0, **call)["branch_embeds"]
    for branch, case in zip(branches, ("visual", "audio"), strict=True):
        close(branch[0, before : before + 60], f"tokens_13_{case}")


def test_attention_masking_is_refused(model):
    with pytest.raises(ValueError, match="video-SALMONN mixes video and audio in every audio-visual embedding"):
        fmd_ext.patch(model, masking="attention")


def test_what_forward_refuses(model):
    batch = VIDEO_SALMONN.together(model, [("av", 0)])
    with pytest.raises(ValueError, match="the clip of sample 0 has 30 tokens, its input_ids hold 29 placeholders"):
        model(**{**batch, "input_ids": batch["input_ids"].masked_fill(torch.arange(37) == 4, 9)})
    with pytest.raises(ValueError, match="pixel_values, qformer_input_ids without num_frames"):
        model(**{**batch, "num_frames": None})
    with pytest.raises(ValueError, match="inputs_embeds already hold the clip; got pixel_values"):
        model(inputs_embeds=torch.zeros(1, 3, 64), pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="260 BEATs frames give 128 tokens, more than the 100"):
        model.encode_audio(torch.zeros(80, 200), torch.zeros(260, 128))


def test_wrong_configurations():
    with pytest.raises(ValueError, match="encoder_hidden_size must be 72, three times"):
        VideoSalmonnConfig(**{**tiny_config().to_dict(), "joint_qformer_config": {"encoder_hidden_size": 80}})
    with pytest.raises(ValueError, match="fine_frames_per_group=3 must divide frames_per_group=10"):
        VideoSalmonnConfig(**{**tiny_config().to_dict(), "fine_frames_per_group": 3})
