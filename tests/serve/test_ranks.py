"""Two ranks of vLLM. Each start takes minutes: only where FMD_EXT_SERVE=all, as in scripts/test-serve."""

from __future__ import annotations

import os

import pytest

from served import ALL, SETTINGS, Library, answers, greedy, start, tokens

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")
if os.environ.get("FMD_EXT_SERVE") != "all":
    pytest.skip("two ranks take minutes: FMD_EXT_SERVE=all runs them", allow_module_level=True)

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_full_model(MODEL, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_equal_the_library(kind, folder, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # vLLM wants cores for each rank
    # In eager mode vLLM 0.32 runs no pipeline on a CPU, of plain models neither: the second rank lacks a buffer that
    # warming up makes, and only what is compiled is warmed up. So it is traced, as if it were to be compiled.
    options = {
        "pipeline_parallel_size": {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    }
    library = Library(SETTINGS)
    expected = [library.answer(ask)[0] for ask in ALL.values()]
    engine = start(folder, settings=SETTINGS, max_num_batched_tokens=128, **{kind: 2}, **options.get(kind, {}))
    try:
        assert tokens(answers(engine, [ask.prompt() for ask in ALL.values()], greedy())) == expected
        assert [tokens(answers(engine, [ask.prompt()], greedy()))[0] for ask in ALL.values()] == expected
    finally:
        engine.llm_engine.engine_core.shutdown()


def test_a_fork_beyond_the_first_rank_is_refused(folder):
    with pytest.raises(ValueError, match="the first rank has 3 layers, and all 4 fork layers must be on it"):
        start(folder, settings={"fork_layers": 4}, pipeline_parallel_size=2)
