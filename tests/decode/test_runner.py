"""The decode runner: whatever `generate` is asked for, it gives what transformers' own loop gives.

Launch by launch, and "replayed": the operators of a step are recorded once and run again on the same tensors, as a CUDA
graph does.
"""

from __future__ import annotations

import copy
import logging
import warnings
from unittest.mock import Mock

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList, TextStreamer

import fmd_ext
from fmd_ext.compat import cache_of
from fmd_ext.decode import sequence as sequence_module
from fmd_ext.decode import store as store_module
from fmd_ext.decode.step import CaptureSite, StaticStep
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_processor, tiny_thinker
from fmd_ext.ops import dispatch
from omni_inputs import AUDIO_VIDEO, INTERLEAVED, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, VIDEO_ONLY, build_inputs
from recorded import record_steps

WORDS_ONLY = {"suppress_tokens": list(TOKEN_IDS.values())}
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
RECORDS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
BATCHES = {"one": [VIDEO_AUDIO], "mixed, padded": [TWO_CLIPS, TEXT_ONLY, INTERLEAVED[:1] + AUDIO_VIDEO, VIDEO_ONLY]}


@pytest.fixture(params=["launched", "replayed"])
def steps(request, monkeypatch):
    """How the steps are run; the recordings so far."""
    return record_steps(monkeypatch) if request.param == "replayed" else []


def both(model, call, **settings):
    """What `generate` returns without and with the runner, from equal random states, and the handle of the second."""
    results = []
    for runner in (False, True):
        handle = fmd_ext.patch(model, runner=runner, **settings)
        torch.manual_seed(5)
        results.append(call())
        if not runner:
            handle.unpatch()
    assert handle.runner.last.startswith("decode runner"), handle.runner.last
    return *results, handle


def assert_equal_outputs(ours, theirs, tolerance=0.0):
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=tolerance, rtol=0)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    assert (ours.hidden_states, ours.attentions) == (theirs.hidden_states, theirs.attentions) == (None, None)


@pytest.mark.parametrize("fork_layers", [0, 2, 4])
@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_search(thinker, steps, batch, masking, fork_layers):
    inputs = build_inputs(BATCHES[batch])
    theirs, ours, handle = both(
        thinker, lambda: thinker.generate(**inputs, **GREEDY, **RECORDS), fork_layers=fork_layers, masking=masking
    )
    # Without fork layers theirs is the untouched model, on attention of another kind.
    assert_equal_outputs(ours, theirs, tolerance=0.0 if fork_layers else 1e-4)
    assert handle.runner.last.startswith("decode runner: 11 ")


@pytest.mark.parametrize("run_ahead", [False, True])
def test_sampling_takes_the_same_random_numbers(thinker, steps, run_ahead):
    """In the call and after it, also where a forward was started for a token that never came."""
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    options = {"do_sample": True, "temperature": 2.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3}

    def call():
        if fmd_ext.handle_of(thinker).runner.wanted:
            fmd_ext.handle_of(thinker).runner.run_ahead = run_ahead
        tokens = [thinker.generate(**inputs, max_new_tokens=40, eos_token_id=list(range(120)), **options)]
        return tokens + [thinker.generate(**inputs, max_new_tokens=5, num_return_sequences=2, **options)]

    if run_ahead:
        inputs = build_inputs([VIDEO_AUDIO])
    theirs, ours, _ = both(thinker, call, fork_layers=2)
    assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]
    assert ours[0].shape[1] < inputs["input_ids"].shape[1] + 40, "an end-of-sequence token ended it"


@pytest.mark.parametrize("run_ahead", [False, True])
def test_samples_end_at_different_times_and_the_cache_goes_on(thinker, steps, run_ahead):
    """Finished samples are padded, the last is cropped, and the next turn on the cache is the same."""
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    free = thinker.generate(**inputs, **GREEDY, **WORDS_ONLY)[:, inputs["input_ids"].shape[1] :]
    ends = [int(free[0, 3]), int(free[1, 6])]

    def call():
        fmd_ext.handle_of(thinker).runner.run_ahead = run_ahead
        cache, width = DynamicCache(), inputs["input_ids"].shape[1]
        options = {"do_sample": False, "eos_token_id": ends, "pad_token_id": TOKEN_IDS["pad_token"], **WORDS_ONLY}
        first = thinker.generate(**inputs, **options, max_new_tokens=12, past_key_values=cache)
        length = cache.get_seq_length()
        ids = torch.cat([first, torch.arange(50, 56).expand(2, -1)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, width:])], dim=1)
        words = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        return first.tolist(), length, thinker.generate(**words, **GREEDY, **WORDS_ONLY).tolist()

    theirs, ours, _ = both(thinker, call, fork_layers=1)
    assert ours == theirs
    assert ours[1] == len(ours[0][0]) - 1


def test_a_cache_goes_on_without_the_runner(thinker, steps):
    """What it leaves behind is an ordinary cache, apart from the pools of later calls."""
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    options = {**GREEDY, **WORDS_ONLY}
    kept = thinker.generate(**inputs, **options, return_dict_in_generate=True)
    # In the same pools. (Of the same shape: the model keeps the last call's M-RoPE offsets for a next turn.)
    thinker.generate(**build_inputs([VIDEO_AUDIO, AUDIO_VIDEO], seed=3), **GREEDY)
    assert len(handle.runner.steps) == len(steps) < 2  # only what was captured needs pools of its own, and is kept
    ids = kept.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])], 1)
    handle.runner.wanted = False
    words = {"input_ids": ids, "attention_mask": mask}
    again = thinker.generate(**words, past_key_values=kept.past_key_values, **options)
    handle.runner.wanted = True
    # All at once, as a new prompt:
    fresh = thinker.generate(**{**inputs, **words}, **options)
    assert again.tolist() == fresh.tolist()


def test_growth_beyond_the_room_and_steps_of_several_shapes(thinker, steps, monkeypatch):
    monkeypatch.setattr(sequence_module, "ROOM", 5)
    monkeypatch.setattr(store_module, "KEPT_STEPS", 2)
    monkeypatch.setattr("fmd_ext.engine.segments.bucket", lambda count: count)
    inputs = build_inputs([TWO_CLIPS, TEXT_ONLY])
    call = {**inputs, **GREEDY, "max_new_tokens": 90}  # a cache has room for 64 at first
    theirs, ours, handle = both(thinker, lambda: thinker.generate(**call).tolist(), fork_layers=2)
    assert ours == theirs
    assert handle.runner.last.startswith("decode runner: 89 ")
    assert (len(steps), len(handle.runner.steps)) in ((0, 0), (18, 2))  # launched; 89 steps in rooms of 5


def test_a_step_is_captured_once(thinker, monkeypatch):
    """Other prompts of the batch size and room are replays of the same step; a changed model is captured anew."""
    recordings = record_steps(monkeypatch)
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    for seed in range(3):
        inputs = build_inputs([VIDEO_AUDIO if seed else AUDIO_VIDEO], seed=seed)
        handle.runner.wanted = True
        ours = thinker.generate(**inputs, **GREEDY)
        handle.runner.wanted = False
        assert thinker.generate(**inputs, **GREEDY).tolist() == ours.tolist()
    assert len(recordings) == 1
    handle.runner.wanted = True
    thinker.generate(**build_inputs([TWO_CLIPS, VIDEO_AUDIO]), **GREEDY)
    assert len(recordings) == 2
    layer = thinker.get_decoder().layers[3].mlp
    weight = layer.down_proj.weight
    try:
        layer.down_proj.weight = torch.nn.Parameter(torch.zeros_like(weight), requires_grad=False)
        ours = thinker.generate(**inputs, **GREEDY)
        assert len(recordings) == 3
        handle.runner.wanted = False
        assert thinker.generate(**inputs, **GREEDY).tolist() == ours.tolist()
    finally:
        layer.down_proj.weight = weight


def test_a_step_keeps_to_the_split_that_it_was_captured_with(thinker, monkeypatch):
    recordings = record_steps(monkeypatch)
    fmd_ext.patch(thinker, fork_layers=2, runner=True)
    inputs = build_inputs([VIDEO_AUDIO])
    try:
        for split, count in (("auto", 1), ("fixed", 2), ("auto", 2)):
            dispatch.select_split(split)
            thinker.generate(**inputs, **GREEDY)
            assert len(recordings) == count
    finally:
        dispatch.select_split("auto")


def test_steps_of_samples_that_fork_and_that_do_not_are_apart(thinker, steps):
    """Batches of one size and room, one after the other: the third finds the first one's step again."""
    batches = [
        build_inputs(samples)
        for samples in ([VIDEO_AUDIO, TEXT_ONLY], [TEXT_ONLY, VIDEO_AUDIO], [VIDEO_AUDIO, TEXT_ONLY])
    ]
    theirs, ours, handle = both(
        thinker, lambda: [thinker.generate(**b, **GREEDY).tolist() for b in batches], fork_layers=2
    )
    assert ours == theirs and len(handle.runner.steps) == len(steps) in (0, 2)


def test_a_kept_step_is_taken_up_behind_its_last_replay(thinker, monkeypatch):
    """The last replay of a call may still run, and the next call may be made on another stream."""
    record_steps(monkeypatch)
    site, order = Mock(), []
    site.leave.side_effect = lambda: order.append("leave")
    site.enter.side_effect = lambda: order.append("enter")
    monkeypatch.setattr(CaptureSite, "on", lambda device: site)
    load = StaticStep.load
    monkeypatch.setattr(StaticStep, "load", lambda self, *args: order.append("load") or load(self, *args))
    with fmd_ext.patch(thinker, fork_layers=2, runner=True):
        for _ in range(2):
            thinker.generate(**build_inputs([VIDEO_AUDIO]), **GREEDY)
    assert order == ["load", "load", "leave", "enter", "load", "leave"]  # loaded again after the capture


def test_a_step_that_cannot_be_captured_is_launched(thinker, monkeypatch, caplog):
    record_steps(monkeypatch)
    inputs = build_inputs([VIDEO_AUDIO])
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    expected = thinker.generate(**inputs, **GREEDY)
    handle.unpatch()
    mlp = thinker.get_decoder().layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda hidden: forward(hidden) + 0 * hidden.sum().item())
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    with caplog.at_level(logging.WARNING):
        assert thinker.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    assert "without a CUDA graph: the capture failed: aten::_local_scalar_dense reads a value back" in caplog.text
    assert "11 static steps without a CUDA graph: the capture failed" in handle.runner.last


def test_a_step_that_waits_for_the_device_is_told_before_it_is_captured(monkeypatch):
    modes, mode = [], "as the user set it"
    monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: mode)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    step = object.__new__(StaticStep)
    step._launch = lambda cache: warnings.warn("something else", stacklevel=1)
    step._refuse_waits(None)
    step._launch = lambda cache: warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    with pytest.raises(RuntimeError, match=r"test_runner.py, line \d+, makes the host wait for the device"):
        step._refuse_waits(None)
    assert modes == ["warn", mode, "warn", mode]


class Collected(TextStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("run_ahead", [False, True])
def test_streamers_processors_and_criteria_of_the_user(thinker, steps, run_ahead):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2).unpatch()

    def no_even_tokens(ids, scores):
        return scores.index_fill(1, torch.arange(0, scores.shape[1], 2), -torch.inf)

    def stop_at_length(ids, scores):
        assert len(scores) == ids.shape[1] - inputs["input_ids"].shape[1]
        return torch.tensor([ids.shape[1] == inputs["input_ids"].shape[1] + 7])

    def call():
        fmd_ext.handle_of(thinker).runner.run_ahead = run_ahead
        streamer = Collected()
        out = thinker.generate(
            **inputs, **GREEDY, **RECORDS, streamer=streamer, logits_processor=LogitsProcessorList([no_even_tokens]),
            stopping_criteria=StoppingCriteriaList([stop_at_length]), min_new_tokens=3, no_repeat_ngram_size=2,
        )  # fmt: skip
        return out, streamer.seen

    (theirs, seen_by_theirs), (ours, seen_by_ours), _ = both(thinker, call, fork_layers=2)
    assert_equal_outputs(ours, theirs)
    assert len(ours.scores) == 7 and seen_by_ours == seen_by_theirs


def test_a_streamer_that_fails_leaves_a_runner_that_works(thinker, steps):
    class Failing(Collected):
        def put(self, value):
            super().put(value)
            if len(self.seen) == 4:
                raise KeyboardInterrupt

    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2, runner=True).runner.run_ahead = True
    expected = thinker.generate(**inputs, **GREEDY)
    cache = DynamicCache()
    with pytest.raises(KeyboardInterrupt):
        thinker.generate(**inputs, **GREEDY, streamer=Failing(), past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 2
    assert thinker.generate(**inputs, **GREEDY).tolist() == expected.tolist()


def test_from_embeddings_with_labels(thinker, steps):
    """The prompt's ids are then empty, and `sequences` hold the new tokens only."""
    ids = torch.arange(30, 54)[None]
    labels = torch.tensor([[0] * 4 + [1] * 8 + [2] * 8 + [0] * 4])
    call = {"inputs_embeds": thinker.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    theirs, ours, handle = both(
        thinker, lambda: thinker.generate(**call, modality_labels=labels, **GREEDY).tolist(), fork_layers=2
    )
    assert ours == theirs and len(ours[0]) == 12
    assert handle.last_call.plan.forked.all()


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_an_answer_that_its_first_token_ends(thinker, run_ahead, keeps):
    """No step at all, or one that was taken back: the answer, the cache and the report hold."""
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    first = thinker.generate(**inputs, **{**GREEDY, "max_new_tokens": 1})[:, -1].tolist()
    call = {**inputs, **GREEDY, "eos_token_id": first, "pad_token_id": 0, "return_dict_in_generate": keeps}
    handle = fmd_ext.patch(thinker, fork_layers=0, runner=True)
    handle.runner.run_ahead = run_ahead
    out = thinker.generate(**call)
    tokens = out.sequences if keeps else out
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == [[token] for token in first]
    if keeps:
        assert cache_of(out).get_seq_length() == inputs["input_ids"].shape[1]
    expected = "1 static steps without a CUDA graph" if run_ahead else "no step was needed"
    assert handle.runner.last.startswith(f"decode runner: {expected}")


def test_one_token_needs_no_step(thinker, steps):
    inputs = build_inputs([VIDEO_AUDIO])
    call = {**inputs, **GREEDY, "max_new_tokens": 1}
    theirs, ours, handle = both(thinker, lambda: thinker.generate(**call).tolist(), fork_layers=2)
    assert ours == theirs and handle.runner.last == "decode runner: no step was needed" and not steps


def test_inference_mode_and_no_grad_in_turn(thinker, steps):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2, runner=True)
    with torch.inference_mode():
        first = thinker.generate(**inputs, **GREEDY)
    second = thinker.generate(**inputs, **GREEDY)
    with torch.inference_mode():
        third = thinker.generate(**inputs, **GREEDY)
    assert first.tolist() == second.tolist() == third.tolist()


def test_the_models_limit_of_positions(steps):
    inputs = build_inputs([VIDEO_AUDIO])
    length = inputs["input_ids"].shape[1]
    short = tiny_thinker(max_position_embeddings=length + 4)
    fmd_ext.patch(short, fork_layers=2, runner=True)
    with pytest.raises(ValueError, match=f"would be {length + 5} positions long; the model's limit is {length + 4}"):
        short.generate(**inputs, **GREEDY)
    assert short.generate(**inputs, **{**GREEDY, "max_new_tokens": 5}).shape[1] == length + 5


# --- where it does not run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "the mode is beam search, and only greedy search and sampling run there"),
        ({"prompt_lookup_num_tokens": 3}, "the mode is assisted generation"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states needs hidden states"),
        ({"use_cache": False}, "use_cache is off"),
        ({"stop_strings": ["~"]}, "stop_strings needs the tokenizer"),
        ({"custom_generate": lambda model, input_ids, **_: input_ids}, "custom_generate is given"),
    ],
)
def test_other_calls_take_the_usual_path_and_say_why(thinker, caplog, options, reason):
    inputs = build_inputs([VIDEO_AUDIO])
    call = {**inputs, **GREEDY, **WORDS_ONLY, "max_new_tokens": 4, **options}
    if "stop_strings" in options:
        call["tokenizer"] = tiny_processor().tokenizer

    def tokens(out):
        return (out if isinstance(out, torch.Tensor) else out.sequences).tolist()

    handle = fmd_ext.patch(thinker, fork_layers=2)
    expected = tokens(thinker.generate(**call))
    handle.unpatch()
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    with caplog.at_level(logging.WARNING):
        assert tokens(thinker.generate(**call)) == expected
        thinker.generate(**call)
    assert reason in handle.runner.last
    assert caplog.text.count("runs without the decode runner") == 1


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_changes_with_the_length_is_not_frozen(thinker, rope_type, monkeypatch):
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    monkeypatch.setattr(thinker.get_decoder().rotary_emb, "rope_type", rope_type)
    assert handle.runner._refusal(thinker, {}) == f"rotary embedding of type {rope_type!r} changes with the length"


def test_a_model_on_several_devices_and_one_that_waits_for_others_are_left_alone(thinker):
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    assert handle.runner._refusal(thinker, {}) == ""
    assert handle.runner._refusal(thinker, {"synced_gpus": True}) == "synced_gpus is set"
    spread = copy.deepcopy(thinker)
    spread.get_decoder().layers[3].to("meta")
    assert fmd_ext.handle_of(spread).runner._refusal(spread, {}) == "the decoder lies on 2 devices"


def test_hooks_of_the_user_still_run(thinker, monkeypatch):
    """A replay would run none. Without graphs they run in every step."""
    inputs, seen = build_inputs([VIDEO_AUDIO]), []
    mlp = thinker.get_decoder().layers[3].mlp
    hook = mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    try:
        handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
        thinker.generate(**inputs, **GREEDY)
        assert "static steps" in handle.runner.last and seen == [inputs["input_ids"].shape[1]] + [1] * 11
        record_steps(monkeypatch)
        seen.clear()
        thinker.generate(**inputs, **GREEDY)
        assert "layers.3.mlp has a forward hook" in handle.runner.last and len(seen) == 12
    finally:
        hook.remove()


def test_what_is_on_by_default(thinker, caplog):
    """On a CPU where the model forks; beams then take the usual path without a word, which loses little there."""
    inputs = build_inputs([VIDEO_AUDIO])
    for settings, beams, said in [
        ({"fork_layers": 2}, 1, "decode runner: 11 static steps without a CUDA graph: there are none on cpu"),
        ({"fork_layers": 2}, 2, "the mode is beam search, and only greedy search and sampling run there"),
        ({"fork_layers": 0}, 1, "off with fork_layers=0"),
        ({"fork_layers": 2, "runner": False}, 1, "switched off by patch(..., runner=False)"),
    ]:
        with fmd_ext.patch(thinker, **settings) as handle:
            thinker.generate(**inputs, **GREEDY, num_beams=beams)
            assert said in handle.runner.last
    assert "decode runner" not in caplog.text
    with fmd_ext.patch(thinker, fork_layers=2) as handle:
        other = Mock(device=torch.device("mps"))
        assert handle.runner._off(other) == "off on mps; patch(..., runner=True) switches it on"
    with fmd_ext.patch(thinker, fork_layers=2, runner=True):
        thinker.generate(**inputs, **GREEDY, num_beams=2)
    assert caplog.text.count("without the decode runner: the mode is beam search") == 1


def test_without_graphs_a_step_runs_over_the_cache_itself(thinker):
    """No pool is copied, neither when the steps begin nor when the cache is handed back."""
    fmd_ext.patch(thinker, fork_layers=2)
    cache = thinker(**build_inputs([VIDEO_AUDIO])).past_key_values
    pools = [layer.keys.data_ptr() for layer in cache.layers]
    words = torch.full((1, cache.get_seq_length() + 1), 50)
    thinker.generate(words, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == words.shape[1] + 11
    assert [layer.keys.data_ptr() for layer in cache.layers] == pools


def test_patching_again_and_copies(thinker, monkeypatch):
    record_steps(monkeypatch)
    handle = fmd_ext.patch(thinker, fork_layers=2, runner=True)
    assert fmd_ext.patch(thinker, fork_layers=2, runner=True) is handle
    with pytest.raises(ValueError, match="runner=True and fusions=None; unpatch it first"):
        fmd_ext.patch(thinker, fork_layers=2)
    inputs = build_inputs([VIDEO_AUDIO])
    expected = thinker.generate(**inputs, **GREEDY).tolist()
    handle.runner.run_ahead = True
    twin = copy.deepcopy(thinker)
    own = fmd_ext.handle_of(twin).runner
    assert own.run_ahead
    assert own is not handle.runner and own.session is not handle.session and not own.steps
    assert own.decoder is twin.get_decoder()
    assert twin.generate(**inputs, **GREEDY).tolist() == expected
    assert len(own.steps) == len(handle.runner.steps) == 1
    handle.unpatch()
    assert not handle.runner.steps, "a handle that is kept holds no pools"


def test_a_mask_is_read_once_and_not_for_every_token(thinker, monkeypatch):
    """In the usual path, where reading it back would make a GPU wait."""
    from fmd_ext.engine import forward as decoder

    reads = []
    original = decoder._apply_padding
    monkeypatch.setattr(decoder, "_apply_padding", lambda *args: reads.append(args[2]) or original(*args))
    inputs = build_inputs([TWO_CLIPS, TEXT_ONLY])
    fmd_ext.patch(thinker, fork_layers=2)
    thinker.generate(**inputs, **GREEDY)
    assert reads == [0]
