"""An hour's worth of requests, at one per second, asked of a server as fast as it answers, where FMD_EXT_SERVE=all."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from http_server import FLAGS, Server, mixed_requests
from served import FRAMES

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")
if os.environ.get("FMD_EXT_SERVE") != "all":
    pytest.skip("the long load takes minutes: FMD_EXT_SERVE=all runs it", allow_module_level=True)

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402

HOUR = 3600  # requests
ROUND = 210  # of them: some of every kind about every clip
WARM = 6  # rounds
# MiB of a process behind the warm rounds. The inputs made of one clip are half a MiB: were those of one request in
# fifty kept, it would be seen.
MOST_GROWTH = 20
# What vLLM keeps is bounded, but by bounds that a small test never reaches. Here the first rounds fill all of it.
FEW_BLOCKS = ["--kv-cache-memory-bytes", str(16 * 2**20)]  # a block takes memory from its first use on
NO_INPUTS = ["--mm-processor-cache-gb", "0"]  # so that every request makes its inputs anew; 4 by default
# oneDNN keeps 1024 compiled products, by their rows: each new size of a step adds some, to hundreds of MiB.
# glibc has an arena for each of the threads that load clips, and keeps what they free.
LIMITS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "MALLOC_ARENA_MAX": "2"}


@pytest.mark.parametrize("plain", [False, True], ids=["FMD", "vLLM"])
def test_memory_does_not_grow(plain, tmp_path):
    """Plain vLLM has the same load, so that what it keeps itself is not taken for ours."""
    flags, requests = [*FLAGS, *FEW_BLOCKS, *NO_INPUTS], mixed_requests(ROUND)
    if plain:
        frames = {"videos_kwargs": {"size": FRAMES}}
        flags += ["--served-model-name", "fmd-ext", "--mm-processor-kwargs", json.dumps(frames)]
        requests = [dataclasses.replace(request, options=()) for request in requests]  # it knows no switch
        options = {"model": str(write_full_model(MODEL, tmp_path / "full")), "plain": True}
    else:
        options = {}
    server = Server(tmp_path / "log.txt", "--fork-layers", "2", flags=flags, variables=LIMITS, **options).wait()
    try:
        expected, memory = server.answers(requests, at_once=16), [server.memory()]
        while len(memory) < HOUR // ROUND:
            assert server.answers(requests, at_once=16) == expected
            memory.append(server.memory())
        print("MiB after each round:", memory)
        growth = {
            name: max(after[name] for after in memory[WARM:]) - before for name, before in memory[WARM - 1].items()
        }
        assert len(growth) >= 3, "the server, the engine's core and its worker are processes of their own"
        assert max(growth.values()) < MOST_GROWTH, (growth, memory)
        server.answer(requests[0])
        assert server.metric("vllm:kv_cache_usage_perc") == 0
    finally:
        server.stop()
