"""The benchmarks: what they report, and above all what they refuse to report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import subprocess

import pytest
import torch

import fmd_ext
from fmd_ext.lab.bench import machine, memory, report, timing
from fmd_ext.lab.bench.__main__ import OPS, build_cases, main
from fmd_ext.lab.bench.cases import Candidate, Case, run_case
from fmd_ext.lab.bench.checking import Reference, WrongOutput, row_error
from fmd_ext.lab.bench.models import sharing_weights
from fmd_ext.lab.bench.page import BEGIN, END, page, with_figures
from fmd_ext.lab.bench.page import main as page_main
from fmd_ext.lab.bench.timing import MAX_ROUNDS, MIN_ROUNDS, Spread, Step, interleave, ratios, rounds_for
from fmd_ext.patching.fusions import row_chunks
from paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The JSON of one quick run of everything."""
    path = tmp_path_factory.mktemp("bench") / "folder" / "quick.json"
    assert main(["--quick", "--repeats", "2", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_quick_run_measures_every_op_against_its_alternatives(quick):
    candidates = {case["case"]: [candidate["name"] for candidate in case["candidates"]] for case in quick["cases"]}
    assert {name.partition("/")[0] for name in candidates} == set(OPS)
    attention = ["fmd_ext", "eager PyTorch", "SDPA per branch"]
    for variant in ("merged", "zero", "attention"):
        assert candidates[f"branched_decode/{variant}"] == attention
        assert candidates[f"branched_prefill/{variant}"] == ["fmd_ext", "fmd_ext, causal runs", *attention[1:]]
    attention.remove("eager PyTorch")  # may come behind, where its scores fit
    for variant in ("batch", "clip, zero", "clip, attention"):
        prefill = candidates[f"branched_prefill/{variant}"]
        assert prefill[:2] == ["fmd_ext", "fmd_ext, causal runs"] and prefill[-1] == "SDPA per branch"
    assert [name for name in candidates["branched_decode/batch"] if name != "eager PyTorch"] == attention
    assert {"append_/batch", "rope_append_/batch", "merge_/clip"} < candidates.keys()
    first_token = next(names for case, names in candidates.items() if case.startswith("first_token/"))
    assert first_token == ["vanilla", "attention masking", "zero masking", "zero masking, no fusions"]
    models = ["vanilla", "attention masking", "zero masking", "zero masking, alpha auto", "two passes"]
    models += ["attention masking, asked first", "zero masking, no fusions", "zero masking, all fusions"]
    assert candidates["model_prefill/tiny"] == models
    static = [f"{name}, runner" for name in models[:3] + models[-2:]]
    assert candidates["model_decode/tiny"] == models + static
    assert candidates["model_generate/tiny"] == models[:3] + static[:3]
    for case in quick["cases"]:
        assert case["rounds"] == 2
        for index, candidate in enumerate(case["candidates"]):
            seconds, ratio = candidate["seconds"], candidate["ratio"]
            assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert candidate["error"] < 1e-5
            assert index or set(ratio.values()) == {1.0}
            assert 0 < candidate["of_peak"] and case["work"]["bytes"] > 0


def test_memory_of_a_long_prompt_is_measured_beside_the_unpatched_models(quick):
    (case,) = quick["memory"]
    assert case["case"] == "model_memory/4500" and case["shapes"]["rows"] == 4500 and case["revision"]["commit"]
    bytes_of = {candidate["name"]: candidate["bytes"] for candidate in case["candidates"]}
    assert list(bytes_of) == list(memory.WAYS)
    # An MLP of half the rows at a time, and logits of one position: less than the unpatched model, which makes all.
    for way in ("attention masking", "zero masking"):
        assert 1 << 20 < bytes_of[way] < 0.9 * bytes_of[f"{way}, no fusions"]
    for candidate in case["candidates"]:
        assert candidate["ratio"] == candidate["bytes"] / bytes_of["vanilla"]


def test_memory_of_a_wrong_model_is_not_reported(monkeypatch):
    original = row_chunks.in_chunks
    monkeypatch.setattr(row_chunks, "in_chunks", lambda mlp, rows, size: 1.01 * original(mlp, rows, size))
    monkeypatch.setattr(row_chunks, "MOST_ROWS", 100)
    monkeypatch.setattr(row_chunks, "differs", lambda mlp: "")
    with torch.inference_mode():
        case = memory.measure("tiny", 300, torch.float32, CPU)
    assert set(case) == {"case", "shapes", "error"} and "attention masking: relative error" in case["error"]


def test_json_says_where_and_with_what(quick):
    assert quick["command"].startswith("python -m fmd_ext.lab.bench --quick")
    assert quick["machine"]["isa"] in ("baseline", "avx2", "avx512")
    assert quick["machine"]["threads"] == torch.get_num_threads()
    assert quick["machine"]["cpu"] and quick["machine"]["cores"] and quick["machine"]["gpu"] is None
    assert quick["versions"]["torch"] == torch.__version__
    assert set(quick["versions"]) == {"python", "torch", "transformers", "fmd_ext"}
    assert (quick["device"], quick["dtype"]) == ("cpu", "float32")
    assert quick["revision"]["commit"] and quick["date"]
    assert quick["workload"]["fork_layers"] * 4 == quick["workload"]["size"]["num_layers"]


def test_low_precision_is_held_against_float32(tmp_path):
    path = tmp_path / "bf16.json"
    ops = ("branched_prefill", "merge_", "rope_append_", "model_prefill", "model_decode")
    assert main(["--quick", "--repeats", "1", "--dtype", "bfloat16", "--only", *ops, "--json", str(path)]) == 0
    for case in json.loads(path.read_text())["cases"]:
        assert 0 < case["candidates"][0]["error"] < 0.1


# --- refusing -------------------------------------------------------------------------------------------------------


def replaced(case, index, candidate):
    candidates = list(case.candidates)
    candidates[index] = candidate
    return dataclasses.replace(case, candidates=candidates)


def slightly_wrong(tensors):
    return [tensor.clone().index_fill_(0, torch.tensor(0, device=tensor.device), 0.5) for tensor in tensors]


@pytest.mark.parametrize("op", [name for name in OPS if not name.startswith("model_")])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_candidate_of_an_op_gets_no_speed(tmp_path, capsys, op, index):
    def build(*args):
        for case in build_cases(*args):
            honest = case.candidates[index]
            wrong = dataclasses.replace(
                honest, output=lambda result, honest=honest: slightly_wrong(honest.output(result))
            )
            yield replaced(case, index, wrong)

    path = tmp_path / "wrong.json"
    assert main(["--quick", "--repeats", "1", "--only", op, "--json", str(path)], build) == 1
    said = capsys.readouterr()
    assert "fmd_ext" not in said.out.partition("of peak\n")[2]
    for case in json.loads(path.read_text())["cases"]:
        assert set(case) == {"case", "shapes", "error"}
        assert case["error"] in said.err and "wrong output" in case["error"]


def test_a_wrong_model_gets_no_speed_and_spoils_no_other_case(tmp_path, capsys):
    """The patched model of another setting: as plausible as a wrong result gets."""

    def build(*args):
        for case in build_cases(*args):
            if case.op == "model_prefill":
                vanilla, attention, zero, *_ = case.candidates
                case = replaced(case, 1, dataclasses.replace(attention, step=zero.step))
            yield case

    path = tmp_path / "wrong.json"
    arguments = ["--quick", "--repeats", "1", "--only", "model_prefill", "merge_", "--json", str(path)]
    assert main(arguments, build) == 1
    *merges, prefill = json.loads(path.read_text())["cases"]
    assert "candidates" not in prefill and "attention masking: wrong output" in prefill["error"]
    assert len(merges) == 3 and all(case["candidates"] for case in merges)
    assert "model_prefill" not in capsys.readouterr().out


def counting_case(wrong_call):
    """A case of one candidate whose result is wrong in call ``wrong_call`` (0: the checked one before the timing)."""
    calls = []

    def run():
        calls.append(None)
        return torch.full((3,), 2.0 if len(calls) - 1 == wrong_call else 1.0)

    reference = Reference([torch.ones(3)], 0.0)
    return Case("counting", "case", {}, [Candidate("one", Step(run), lambda out: [out], reference)])


def test_an_output_that_goes_wrong_while_timed_is_found():
    rounds = 3  # calls: checked, warm-up, then these
    assert "candidates" in run_case(counting_case(wrong_call=None), CPU, rounds, 0.0)
    for wrong_call in (0, 1 + rounds):
        assert "error" in run_case(counting_case(wrong_call), CPU, rounds, 0.0)


def test_check_sees_shapes_nan_and_small_rows():
    expected = torch.tensor([[100.0, 1.0], [1e-3, 1e-3], [0.0, 0.0]])
    reference = Reference([expected], 1e-3)
    assert reference.check("same", [expected.clone()]) == 0.0
    for row, value in ((0, float("nan")), (0, float("inf")), (1, 1.1e-3), (2, 1e-20)):
        output = expected.clone()
        output[row, 0] = value
        with pytest.raises(WrongOutput, match="wrong output"):
            reference.check("different", [output])
    with pytest.raises(WrongOutput, match=r"shapes \[\[2, 2\]\]"):
        reference.check("short", [expected[:2]])


def test_allowed_error_is_twice_that_of_plain_pytorch_plus_a_rounding():
    exact = torch.tensor([[1.0, 2.0]])
    plain = torch.tensor([[1.0, 2.25]], dtype=torch.bfloat16)
    assert row_error(plain, exact) == 0.125
    assert Reference.beside([exact], [plain]).allowed == 0.25 + 2**-7 + 4 * 2**-23


# --- timing ---------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_preparation_is_not_timed():
    order = []

    def step(name):
        return Step(lambda: order.append(name) or name, prepare=lambda: order.append(f"prepare {name}"))

    rounds = []
    seconds, last = interleave({name: step(name) for name in "ABC"}, 12, CPU, lambda: rounds.append(None))
    assert order[::2] == [f"prepare {name}" for name in order[1::2]]
    turns = ["".join(order[i + 1 : i + 6 : 2]) for i in range(0, len(order), 6)]
    assert {"".join(sorted(turn)) for turn in turns} == {"ABC"}, "every round has every candidate once"
    assert len(set(turns)) > 3, "in changing order"
    assert [len(seconds[name]) for name in "ABC"] == [12, 12, 12] and len(rounds) == 12
    assert last == {"A": "A", "B": "B", "C": "C"}


def test_preparation_takes_no_time():
    slow = Step(lambda: None, prepare=lambda: torch.randn(1 << 20))
    seconds, _ = interleave({"slow": slow}, 5, CPU)
    assert min(seconds["slow"]) < 1e-4


def test_on_cuda_an_op_begins_behind_other_work_and_a_model_on_an_idle_device(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def elapsed_time(self, end):
            return 2.0

    class Other:
        def zero_(self):
            order.append("cold")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("busy"), raising=False)
    monkeypatch.setattr(timing, "_other_memory", lambda device: Other())
    for from_idle, before in ((False, ["cold", "busy"]), (True, [])):
        order.clear()
        step = Step(lambda: order.append("run"), from_idle=from_idle)
        seconds, _ = interleave({"step": step}, 1, torch.device("cuda"))
        assert order == ["wait", *before, "event", "run", "event", "wait"] and seconds["step"] == [2e-3]


def test_statistics():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(min=1.0, q1=2.0, median=3.0, q3=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert rounds_for(0.25, 10.6) == 42
    assert (rounds_for(100.0, 10.0), rounds_for(0.0, 10.0)) == (MIN_ROUNDS, MAX_ROUNDS)


def test_numbers_have_units():
    assert [report.duration(s) for s in (12.34, 0.0123, 4.5e-6, 3e-8)] == ["12.3 s", "12.3 ms", "4.50 us", "0.03 us"]


def test_modules_share_weights_but_not_the_patch(thinker):
    copied = sharing_weights(thinker)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in thinker.parameters()]
    fmd_ext.patch(copied, fork_layers=1)
    assert fmd_ext.handle_of(thinker) is None


# --- machine, arguments, page ---------------------------------------------------------------------------------------


def test_revision(tmp_path):
    package = tmp_path / "fmd_ext"
    package.mkdir()
    source = package / "ops.py"
    source.write_text("1\n")

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert machine.revision(package) == {"commit": "not a git checkout", "dirty": None}
    git("init", "-q")
    assert machine.revision(package) == {"commit": "no commit yet", "dirty": True}
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = machine.revision(package)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text("what a benchmark wrote\n")
    assert machine.revision(package) == clean
    source.write_text("2\n")
    assert machine.revision(package) == {**clean, "dirty": True}
    installed = tmp_path / ".venv" / "site-packages" / "fmd_ext"
    installed.mkdir(parents=True)
    assert machine.revision(installed) == {"commit": "not a git checkout", "dirty": None}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "unknown device 'tpu'"),
        ("meta", "not for meta"),
        pytest.param(
            "cuda",
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_device_that_is_not_there(capsys, device, message):
    assert main(["--quick", "--device", device]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "attention"], ["--repeats", "0"], ["--dtype", "int8"]])
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_page_holds_the_measured_figures(quick, tmp_path):
    (tmp_path / "bench_cpu.json").write_text(json.dumps(quick))
    (tmp_path / "evidence.json").write_text("{}")  # data of other pages may lie beside it
    assert page_main([str(tmp_path), str(tmp_path / "performance.md")]) == 0
    text = (tmp_path / "performance.md").read_text()
    assert text == page([quick])
    zero = quick["cases"][-2]["candidates"][2]
    expected = f"| zero masking | {report.duration(zero['seconds']['median'])} |"
    assert expected in text and quick["revision"]["commit"] in text and quick["machine"]["cpu"] in text
    assert text.rstrip().endswith("## GPU\n\nNot measured.")


def test_page_refuses_wrong_outputs_and_no_data(quick, tmp_path, capsys):
    assert page_main([str(tmp_path), str(tmp_path / "performance.md")]) == 2
    broken = copy.deepcopy(quick)
    broken["cases"][0] = {"case": "append_/prefill", "shapes": {}, "error": "append_/prefill, fmd_ext: wrong output"}
    (tmp_path / "bench_cpu.json").write_text(json.dumps(broken))
    assert page_main([str(tmp_path), str(tmp_path / "performance.md")]) == 1
    assert "wrong output" in capsys.readouterr().err
    assert not (tmp_path / "performance.md").exists()


def test_the_page_in_docs_is_the_one_of_its_data():
    """Figures on the page come from the data beside it, not from a hand."""
    runs = [json.loads(file.read_text()) for file in sorted((ROOT / "docs" / "data").glob("bench_*.json"))]
    assert runs
    assert (ROOT / "docs" / "performance.md").read_text() == page(runs)
    readme = (ROOT / "README.md").read_text()
    assert with_figures(readme, runs) == readme


def test_figures_of_the_readme(quick):
    text = with_figures(f"before\n{BEGIN}\nold\n{END}\nafter\n", [quick])
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    prefill = next(case for case in quick["cases"] if case["case"].startswith("model_prefill"))
    zero = prefill["candidates"][2]
    assert zero["name"] == "zero masking"
    assert f"| prefill, zero masking | the unpatched model | {zero['ratio']['median']:.2f} (" in text
    with pytest.raises(ValueError, match="no single part between"):
        with_figures("no markers", [quick])
