"""The decode runner on a real CUDA device: captured graphs, no wait, the logits of the usual path. Else skipped."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

import fmd_ext
from fmd_ext.decode.sequence import StepSequence
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, build_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no graph was captured on one"),
]
COUNT = 40


@pytest.fixture(scope="module")
def model():
    return tiny_thinker(seed=0).to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def exact(model):
    """The same weights in float32, on the CPU."""
    exact = tiny_thinker(seed=0)
    exact.load_state_dict({name: value.cpu().float() for name, value in model.state_dict().items()})
    return exact


def on_device(samples, device="cuda"):
    inputs = build_inputs(samples)
    moved = {name: value.to(device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return inputs | {n: v.bfloat16() if v.is_floating_point() else v for n, v in moved.items()}


def forced(ids):
    """The same words whatever the model says, so that rounding cannot make two runs part."""
    words = torch.randint(20, 260, (COUNT,), generator=torch.Generator().manual_seed(0)).to(ids.device)

    def force(so_far, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, words[so_far.shape[1] - ids.shape[1]][None], 0.0)

    return LogitsProcessorList([force])


def logits(model, inputs):
    """float32 [batch, COUNT, vocabulary], on the CPU."""
    out = model.generate(
        **inputs, max_new_tokens=COUNT, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, logits_processor=forced(inputs["input_ids"]),
    )  # fmt: skip
    return torch.stack(out.logits, 1).cpu().float()


def exact_logits(exact, inputs, **settings):
    moved = {name: value.cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    inputs = inputs | {n: v.float() if v.is_floating_point() else v for n, v in moved.items()}
    with fmd_ext.patch(exact, runner=False, **settings):
        return logits(exact, inputs)


@pytest.mark.parametrize("samples", [[VIDEO_AUDIO], [TWO_CLIPS, TEXT_ONLY, AUDIO_VIDEO]], ids=len)
@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("fork_layers", [0, 2, 4])
def test_replays_are_as_exact_as_the_usual_path(model, exact, samples, masking, fork_layers):
    inputs, settings = on_device(samples), {"fork_layers": fork_layers, "masking": masking}
    want = exact_logits(exact, inputs, **settings)
    with fmd_ext.patch(model, runner=False, **settings):
        allowed = 2 * (logits(model, inputs) - want).abs().max()
    with fmd_ext.patch(model, runner=True, **settings) as handle:
        for _ in range(2):  # captured, and found again
            actual = logits(model, inputs)
            assert handle.runner.last == f"decode runner: {COUNT - 1} replays of a captured graph"
            assert (actual - want).abs().max() <= allowed
        assert len(handle.runner.steps) == 1


def test_it_is_on_by_default_where_the_model_forks(model):
    inputs = on_device([VIDEO_AUDIO])
    for fork_layers, said in ((2, "replays of a captured graph"), (0, "off with fork_layers=0")):
        with fmd_ext.patch(model, fork_layers=fork_layers) as handle:
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
            assert said in handle.runner.last


def test_a_step_waits_for_nothing(model, monkeypatch):
    """torch raises at every call that makes the host wait for the device, from the second step on."""
    feed, waits = StepSequence.feed, []

    def strict(self, tokens):
        if self.step is None:
            return feed(self, tokens)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return feed(self, tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(self.total)

    monkeypatch.setattr(StepSequence, "feed", strict)
    with fmd_ext.patch(model, fork_layers=2):
        model.generate(**on_device([VIDEO_AUDIO, TEXT_ONLY]), max_new_tokens=8, min_new_tokens=8)
    assert waits == list(range(2, 8))


def test_a_step_that_waits_is_launched_and_nothing_is_amiss_afterwards(model, monkeypatch):
    inputs = on_device([VIDEO_AUDIO])
    call = {**inputs, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": True}
    mlp = model.get_decoder().layers[1].mlp
    forward = mlp.forward
    stream = torch.cuda.current_stream()
    with monkeypatch.context() as waiting:
        waiting.setattr(mlp, "forward", lambda hidden: forward(hidden) + 0 * hidden.sum().item())
        with fmd_ext.patch(model, fork_layers=2) as handle:
            model.generate(**call)
            assert "5 static steps without a CUDA graph" in handle.runner.last
            assert f"{__file__}, line" in handle.runner.last and "makes the host wait" in handle.runner.last
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
    with fmd_ext.patch(model, fork_layers=2) as handle:
        model.generate(**call)
        assert handle.runner.last == "decode runner: 5 replays of a captured graph"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: no graph was captured on a second")
def test_a_device_that_is_not_current(exact):
    model, inputs = tiny_thinker(seed=0).to("cuda:1", torch.bfloat16), on_device([VIDEO_AUDIO], "cuda:1")
    want = exact_logits(exact, inputs, fork_layers=2)
    with fmd_ext.patch(model, fork_layers=2, runner=False):
        allowed = 2 * (logits(model, inputs) - want).abs().max()
    with fmd_ext.patch(model, fork_layers=2) as handle:
        assert (logits(model, inputs) - want).abs().max() <= allowed
        assert "replays" in handle.runner.last and torch.cuda.current_device() == 0


def test_another_stream(model):
    inputs = on_device([VIDEO_AUDIO])
    with fmd_ext.patch(model, fork_layers=2) as handle:
        expected = logits(model, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = logits(model, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(actual, expected) and "replays" in handle.runner.last


def test_the_sampled_tokens_leave_the_same_random_state(model):
    inputs = on_device([VIDEO_AUDIO])
    states = []
    for run_ahead in (False, True):
        with fmd_ext.patch(model, fork_layers=2) as handle:
            handle.runner.run_ahead = run_ahead
            torch.manual_seed(3)
            tokens = model.generate(**inputs, max_new_tokens=60, do_sample=True, eos_token_id=list(range(120)))
            states.append((tokens.tolist(), torch.cuda.get_rng_state().tolist()))
    assert states[0] == states[1]
