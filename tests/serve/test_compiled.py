"""Compiled modes of vLLM. Each starts in minutes: only where FMD_EXT_SERVE=all, as in scripts/test-serve."""

from __future__ import annotations

import os

import pytest

from served import ALL, SETTINGS, Library, answers, greedy, start, tokens

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")
if os.environ.get("FMD_EXT_SERVE") != "all":
    pytest.skip("compiled modes take minutes: FMD_EXT_SERVE=all runs them", allow_module_level=True)

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402


@pytest.fixture(scope="module")
def expected():
    library = Library(SETTINGS)
    return {name: library.answer(ask)[0] for name, ask in ALL.items()}


def told(folder, **compilation):
    engine = start(
        write_full_model(MODEL, folder),
        settings=SETTINGS,
        enforce_eager=False,
        max_num_batched_tokens=128,  # twice as many rows are beyond it
        compilation_config=compilation,
    )
    together = tokens(answers(engine, [ask.prompt() for ask in ALL.values()], greedy()))
    return engine, dict(zip(ALL, together, strict=True))


def test_pieces_as_on_a_gpu(expected, tmp_path, monkeypatch):
    """Between pieces is attention; in the fork layers they have N rows beside 2N. A piece looks its code up by the
    first size that it is called with: that must be N, since 2N may be beyond the largest that there is code for.

    On a CPU vLLM compiles in one piece, so what it sets is set back.
    """
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.piecewise_backend import PiecewiseBackend
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    usual, sizes = CpuPlatform.check_and_update_config, set()

    def keeps_pieces(vllm_config):
        usual(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.backend = "eager"

    called = PiecewiseBackend.__call__

    def noting_sizes(self, *args):
        sizes.update(args[index] for index in self.sym_shape_indices[:1])
        return called(self, *args)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(keeps_pieces))
    monkeypatch.setattr(PiecewiseBackend, "__call__", noting_sizes)
    before = compilation_counter.num_piecewise_capturable_graphs_seen
    engine, found = told(tmp_path / "full", cudagraph_mode="NONE", compile_sizes=[])
    pieces = compilation_counter.num_piecewise_capturable_graphs_seen - before
    assert engine.llm_engine.vllm_config.compilation_config.mode == CompilationMode.VLLM_COMPILE
    assert pieces > 6 + SETTINGS["fork_layers"], "it was not cut at attention"
    assert found == expected
    assert max(sizes) == 128, "no step was full, or a piece was called with twice its rows"


def test_as_a_cpu_compiles(expected, tmp_path):
    engine, found = told(tmp_path / "full")
    assert engine.llm_engine.vllm_config.compilation_config.backend == "inductor"
    assert found == expected
