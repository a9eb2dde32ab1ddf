"""Fork-merge decoding on every ported model: against the plain reference, in batches, by generate and command line."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
import video_salmonn2_plus_recorded
import video_salmonn2_recorded
import videollama2_recorded
from fmd_ext import FMDConfig
from fmd_ext.adapters import find_adapter
from fmd_ext.cli import main
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.lab.tiny import save_random_model
from ports import PORTS
from recorded import record_steps

# One form of each port, where its other form differs in nothing that the test is about.
ONE_FORM = ("videollama2_qwen2", "video_salmonn", "video_salmonn2", "video_salmonn2_plus_inference")
ALL = ("one", "padded", "mixed")


def cases(**batches):
    """[(port, batch)] from the batches of each port."""
    return [(name, batch) for name, chosen in batches.items() for batch in chosen]


@pytest.fixture
def port(request):
    chosen = PORTS[request.param]
    yield chosen
    if fmd_ext.handle_of(chosen.model) is not None:
        fmd_ext.unpatch(chosen.model)


each = pytest.mark.parametrize("port", ONE_FORM, indirect=True)


@pytest.mark.parametrize("setting", range(3))
@pytest.mark.parametrize(
    "port, batch",
    cases(
        videollama2_qwen2=ALL,
        videollama2_mistral=("mixed",),
        video_salmonn=ALL,
        video_salmonn2=ALL,
        video_salmonn2_plus_inference=ALL,
        video_salmonn2_plus_training=("mixed",),
    ),
    indirect=["port"],
)
def test_logits_equal_the_reference(port, batch, setting):
    """Samples without both modalities are left alone, and so is the model after the patch."""
    model, inputs = port.model, port.batch(batch)
    config = FMDConfig(**port.setting(setting)).resolve(FMDConfig(), port.num_layers)
    expected = reference_logits(model, config, **inputs)
    keep = inputs["attention_mask"].bool()
    vanilla = model(**inputs).logits
    handle = fmd_ext.patch(model, config)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[keep], expected[keep], atol=1e-4, rtol=0)
    forked = port.forked[batch]
    assert handle.last_call.plan.forked.tolist() == forked and not handle.fusions["rotation"].why_not
    for row, (is_forked, mask) in enumerate(zip(forked, keep, strict=True)):
        difference = (logits[row] - vanilla[row])[mask].abs().max()
        assert difference > port.moves if is_forked else difference < 1e-4
    fmd_ext.unpatch(model)
    assert torch.equal(model(**inputs).logits, vanilla)


@each
def test_no_fork_layers_are_the_untouched_model(port):
    inputs = port.batch("mixed")
    vanilla = port.model(**inputs).logits
    with fmd_ext.patch(port.model, fork_layers=0):
        assert torch.equal(port.model(**inputs).logits, vanilla)


@pytest.mark.parametrize("setting", [0, 2])
@pytest.mark.parametrize(
    "port, batch",
    cases(
        videollama2_qwen2=("padded", "mixed"),
        videollama2_mistral=("padded",),
        video_salmonn=("mixed",),
        video_salmonn2=("padded", "mixed"),
        video_salmonn2_plus_inference=("padded", "mixed"),
        video_salmonn2_plus_training=("mixed",),
    ),
    indirect=["port"],
)
def test_greedy_tokens_equal_the_reference(port, batch, setting):
    inputs = port.batch(batch)
    config = FMDConfig(**port.setting(setting)).resolve(FMDConfig(), port.num_layers)
    expected = reference_generate(port.model, config, 6, **inputs)
    fmd_ext.patch(port.model, config)
    assert port.answer(inputs, max_new_tokens=6).tolist() == expected.tolist()


@pytest.mark.parametrize("patched", [False, True])
@each
def test_batches_equal_their_samples(port, patched):
    if patched:
        fmd_ext.patch(port.model, fork_layers=2)
    logits, tokens = port.model(**port.batch("mixed")).logits, port.answer(port.batch("mixed"), max_new_tokens=4)
    for row, sample in enumerate(port.samples("mixed")):
        own = port.model(**sample).logits[0]
        torch.testing.assert_close(logits[row, -len(own) :], own, atol=1e-4, rtol=0)
        assert port.answer(sample, max_new_tokens=4).tolist() == tokens[row : row + 1].tolist()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    "port, batch, beams, sequences",
    [(name, "mixed", 2, 2) for name in ONE_FORM] + [("video_salmonn", "clips", 3, 1)],
    indirect=["port"],
)
def test_beams_and_several_sequences_keep_clips_with_their_samples(port, batch, beams, sequences, patched):
    """Repeated samples take their own clips along, also when each sample has another number of them."""
    if patched:
        fmd_ext.patch(port.model, fork_layers=2)
    options = {"max_new_tokens": 4, "num_beams": beams, "num_return_sequences": sequences}
    together = port.answer(port.batch(batch), **options)
    for row, sample in enumerate(port.samples(batch)):
        assert together[sequences * row : sequences * (row + 1)].tolist() == port.answer(sample, **options).tolist()


@each
def test_a_second_turn_on_one_cache(port):
    model, inputs = port.model, port.batch("one")
    inputs.pop("position_ids", None)
    fmd_ext.patch(model, fork_layers=2)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, **port.options}
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[20, 30, 40]])], dim=1)
    both = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = model(**both, logits_to_keep=1).logits
    cache = first.past_key_values
    rest = ids[:, cache.get_seq_length() :]
    onward = model(input_ids=rest, attention_mask=both["attention_mask"], past_key_values=cache, logits_to_keep=1)
    torch.testing.assert_close(onward.logits, whole, atol=1e-4, rtol=0)


@each
def test_the_runner_replays_its_steps(port, monkeypatch):
    """Decode steps as a graph on CUDA would replay them: nothing in them reads a value back."""
    inputs = port.batch("mixed")
    with fmd_ext.patch(port.model, fork_layers=2) as handle:
        assert not handle.fusions["rotation"].why_not
        expected = port.answer(inputs, max_new_tokens=5)
    recordings = record_steps(monkeypatch)
    with fmd_ext.patch(port.model, fork_layers=2, runner=True):
        assert torch.equal(port.answer(inputs, max_new_tokens=5), expected)
    assert len(recordings) == 1


@pytest.mark.parametrize(
    "port, counts, sample, runs",
    [
        # A line break between the clips.
        ("videollama2_qwen2", {1: [8, 16, 0, 0], 2: [0, 64, 0, 32]}, 1, [0, 1, 2, 0, 1, 2, 0]),
        # 30 tokens for ten frames or less, and for the sound alone.
        ("video_salmonn", {1: [0, 0, 30, 0, 0], 2: [0, 0, 0, 0, 30], 3: [30, 0, 0, 60, 0]}, 3, [0, 3, 0]),
        # Five frames; the 12 tokens of two windows of sound become 15, three behind each frame.
        ("video_salmonn2", {1: [30, 30, 0, 0], 2: [0, 15, 0, 12]}, 1, [0, *[1, 2] * 5, 0]),
        # Times are text.
        ("video_salmonn2", {1: [30, 30, 0, 0]}, 0, [0, *[1, 0] * 5]),
        # 12 tokens for each 30 s begun, two per second: the second clip's 24 all stand before its last pair of frames.
        (
            "video_salmonn2_plus_inference",
            {1: [6, 12, 0, 0], 2: [0, 36, 0, 12]},
            1,
            [0, 1, 2, 1, 2, 1, 2, 0, 1, 2, 1, 2, 1, 0],
        ),
    ],
    indirect=["port"],
)
def test_labels_follow_the_clips_parts(port, counts, sample, runs):
    """How many positions of each label the mixed batch's samples have, and the runs of labels of one of them."""
    inputs = port.batch("mixed")
    labels = find_adapter(port.model).labels_of(port.model, inputs["input_ids"], inputs)
    assert {label: [int((row == label).sum()) for row in labels] for label in counts} == counts
    found, lengths = torch.unique_consecutive(labels[sample], return_counts=True)
    padding = labels.shape[1] - int(inputs["attention_mask"][sample].sum())
    assert found.tolist() == runs and lengths[0] > padding
    if port.name == "video_salmonn2" and sample == 1:
        assert lengths[1:-1].tolist() == [6, 3] * 5


# --- the command line -------------------------------------------------------------------------------------------------

CLIP = str(videollama2_recorded.CLIP)
PIXELS = ["--max-frame-pixels", "3136"]


def videollama2(kind):
    return lambda folder, *state: videollama2_recorded.write_official_folder(folder, kind, *state)


SALMONN2, PLUS = video_salmonn2_recorded.write_official_folder, video_salmonn2_plus_recorded.write_official_folder


@pytest.mark.parametrize(
    "write, options, forked, vanilla, note",
    [
        (videollama2("qwen2"), [], 3, ["--fps", "1"], "the model takes 4 frames of any clip"),
        (videollama2("mistral"), [], 3, ["--fps", "1"], "the model takes 4 frames of any clip"),
        (SALMONN2, [], 2, ["--fps", "2", "--interleaved"], "picks frames by a rule of its own"),
        (PLUS, PIXELS, 3, ["--fps", "1"], "picks frames by a rule of its own"),
    ],
    ids=["videollama2_qwen2", "videollama2_mistral", "video_salmonn2", "video_salmonn2_plus"],
)
def test_ask_answers_from_an_official_folder(tmp_path, capsys, write, options, forked, vanilla, note):
    command = ["ask", CLIP, "What?", "--model", str(write(tmp_path / "model")), "--max-new-tokens", "4", *options]
    assert main([*command, "--compare", "--fork-layers", str(forked), "--masking", "attention"]) == 0
    assert f"{forked} of 3 layers forked, masking attention" in capsys.readouterr().out
    assert main([*command, "--vanilla", *vanilla]) == 0
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("write", [videollama2("qwen2"), SALMONN2], ids=["videollama2", "video_salmonn2"])
def test_verify_takes_an_official_folder(tmp_path, capsys, write):
    folder = write(tmp_path / "model")
    assert main(["verify", CLIP, "--model", str(folder), "--fork-layers", "2", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.count("equal") >= 2


def test_ask_and_verify_take_a_saved_folder(tmp_path, capsys):
    folder = save_random_model(tmp_path / "model", family="video_salmonn2_plus")
    command = [CLIP, "--model", str(folder), "--fork-layers", "2", "--max-new-tokens", "3"]
    assert main(["verify", *command]) == 0
    assert capsys.readouterr().out.count("equal") >= 2
    assert main(["ask", *command[:1], "What?", *command[1:]]) == 0
    assert "weights are random" in capsys.readouterr().err


@pytest.mark.parametrize(
    "write, state, gone, extra, said",
    [
        (
            videollama2("qwen2"),
            lambda: videollama2_recorded.official_state("qwen2"),
            "model.norm.weight",
            [],
            "it lacks 1 tensors: model.norm.weight",
        ),
        (videollama2("qwen2"), None, None, ["--interleaved"], "it cannot interleave picture and sound"),
        (videollama2("qwen2"), None, None, ["--max-frame-pixels", "9"], "sees frames of one size only"),
        (
            SALMONN2,
            video_salmonn2_recorded.official_state,
            "model.image_newline",
            [],
            "it lacks 1 tensors: model.image_newline",
        ),
        (
            PLUS,
            video_salmonn2_plus_recorded.official_state,
            "audio.q_tokens",
            [],
            "it lacks 1 tensors: model.audio.q_tokens",
        ),
    ],
    ids=["videollama2_partial", "interleaved", "frame_pixels", "video_salmonn2_partial", "video_salmonn2_plus_partial"],
)
def test_ask_refuses_in_one_line(tmp_path, capsys, write, state, gone, extra, said):
    states = [] if gone is None else [{name: tensor for name, tensor in state().items() if name != gone}]
    folder = write(tmp_path / "model", *states)
    assert main(["ask", CLIP, "What?", "--model", str(folder), *extra]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
