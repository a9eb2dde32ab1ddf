"""An hour's worth of requests, at one per second, asked of a server as fast as it answers, where FMD_EXT_SERVE=all."""

from __future__ import annotations

import os

import pytest

from http_server import FLAGS, Server, mixed_requests

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")
if os.environ.get("FMD_EXT_SERVE") != "all":
    pytest.skip("the long load takes minutes: FMD_EXT_SERVE=all runs it", allow_module_level=True)

HOUR = 3600  # requests
# MiB in the second half of the hour. The inputs made of one clip are half a MiB, so losing those of one request in ten
# would be seen. In the first half the allocators of vLLM's processes take what they go on to reuse.
MOST_GROWTH = 50


def test_memory_does_not_grow(tmp_path):
    # So few blocks that the first round has written to all of them: until then they take no memory yet.
    flags = [*FLAGS, "--kv-cache-memory-bytes", str(16 * 2**20)]
    server = Server(tmp_path / "log.txt", "--fork-layers", "2", flags=flags).wait()
    try:
        requests = mixed_requests(210)  # some of every kind about every clip; caches have seen all in the first round
        expected, memory = server.answers(requests, at_once=16), []
        for _ in range(HOUR // len(requests)):
            assert server.answers(requests, at_once=16) == expected
            memory.append(round(server.memory()))
        print("MiB after each round:", memory)
        half = len(memory) // 2
        assert max(memory[half:]) - memory[half - 1] < MOST_GROWTH, memory
        server.answer(requests[0])
        assert server.metric("vllm:kv_cache_usage_perc") == 0
    finally:
        server.stop()
