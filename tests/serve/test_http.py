"""One server, started by `fmd-ext serve` and asked over HTTP."""

from __future__ import annotations

import json
import time

import pytest

from http_server import Request, Server, clip_file, data_url, mixed_requests, streamed

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")

from fmd_ext.lab.trained import MODEL  # noqa: E402
from fmd_ext.serve.folder import write_full_model  # noqa: E402

QUESTION = "What is making sound?"
SEPARATE = (("video", 0), ("audio", 0))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server") / "log.txt", "--fork-layers", "2", "--alpha", "0.8").wait()
    yield started
    started.stop()


def test_the_command_is_printed_before_it_runs(server):
    first = server.log.read_text().splitlines()[0]
    assert "FMDQwen2_5OmniForConditionalGeneration" in first and '"fork_layers": 2' in first


def test_200_mixed_requests_at_16_concurrent(server):
    requests = mixed_requests(200)
    one_by_one = server.answers(requests, at_once=1)
    assert server.answers(requests, at_once=16) == one_by_one
    assert len({tuple(answer) for answer in one_by_one}) > 20, "all alike: nothing would be noticed"


def test_a_stream_says_what_the_whole_answer_says(server):
    whole = server.answer(Request(QUESTION, SEPARATE))
    assert server.answer(Request(QUESTION, SEPARATE, stream=True)) == whole


def test_the_switch_changes_the_answer_and_only_where_there_is_something_to_fork(server):
    off = (("mm_processor_kwargs", {"fmd": False}), ("logprobs", True), ("max_tokens", 4))
    on = off[1:]

    def first_logprobs(parts, options):
        status, content = server.post(Request(QUESTION, parts, options=options).body())
        assert status == 200, content
        return [token["logprob"] for token in content["choices"][0]["logprobs"]["content"]]

    for parts, forks in ((SEPARATE, True), (SEPARATE[:1], False), (SEPARATE[1:], False)):
        a, b = first_logprobs(parts, on), first_logprobs(parts, off)
        assert (abs(a[0] - b[0]) > 1e-3) == forks, (parts, a, b)


def test_several_answers_and_a_seed(server):
    options = (("n", 3), ("temperature", 1.5), ("seed", 5), ("max_tokens", 12))
    first, second = (server.answer(Request(QUESTION, SEPARATE, options=options)) for _ in range(2))
    assert first == second and len(first) == 3 and len(set(first)) > 1  # drawn apart, and two may be alike


def blocks_in_use(server):
    """The gauge is written by the engine's next step, so there is one."""
    server.answer(Request("What?"))
    return server.metric("vllm:kv_cache_usage_perc"), server.metric("vllm:num_requests_running")


def test_a_client_that_goes_away_leaves_no_block_behind(server):
    options = (("ignore_eos", True), ("max_tokens", 800))
    response = server.open({**Request(QUESTION, SEPARATE, options=options).body(), "stream": True})
    pieces = streamed(response)
    for _ in range(3):
        next(pieces)
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    response.close()
    end = time.monotonic() + 30
    while blocks_in_use(server) != (0.0, 0.0) and time.monotonic() < end:
        time.sleep(0.5)
    assert blocks_in_use(server) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"video": b"this is no clip" * 50}, "video"),
        ({"audio": b"this is no sound" * 50}, "audio"),
        ({"video": clip_file(0).read_bytes()[:3000]}, "video"),
    ],
    ids=["no clip", "no sound", "half a clip"],
)
def test_a_malformed_clip_is_refused_and_the_server_lives_on(server, tmp_path, change, says):
    before = server.answer(Request(QUESTION, SEPARATE))
    ((kind, content),) = change.items()
    file = tmp_path / "clip.mp4"
    file.write_bytes(content)
    body = Request(QUESTION, SEPARATE).body()
    for part in body["messages"][0]["content"]:
        if part["type"] == f"{kind}_url":
            part[part["type"]]["url"] = data_url(kind, file)
    status, message = server.post(body)
    assert status == 400 and says in message.lower(), (status, message)
    assert server.answer(Request(QUESTION, SEPARATE)) == before


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(QUESTION, (("video", 0), ("video", 1), ("video", 2))), "At most 2 video"),
        (Request("word " * 1100, SEPARATE), "maximum context length"),
        (Request(QUESTION, SEPARATE, options=(("mm_processor_kwargs", {"fmd": "no"}),)), "must be true or false"),
    ],
    ids=["clips", "length", "switch"],
)
def test_beyond_a_limit_is_refused_and_the_server_lives_on(server, request_, says):
    before = server.answer(Request(QUESTION, SEPARATE))
    status, message = server.post(request_.body())
    assert status == 400 and says in message, (status, message)
    assert server.answer(Request(QUESTION, SEPARATE)) == before


def test_the_openai_client(server):
    from openai import OpenAI

    content = Request(QUESTION, SEPARATE).body()["messages"]
    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="fmd-ext", messages=content, stream=True, temperature=0, max_tokens=8, extra_body={}
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert ["".join(pieces)] == server.answer(Request(QUESTION, SEPARATE))


def test_a_bad_setting_is_refused_at_start(tmp_path):
    """Of a command written by hand: `fmd-ext serve` would not run it. vLLM makes its configuration before it loads a
    model, and there the settings are checked."""
    flags = ["--enforce-eager"]
    flags += ["--hf-overrides", json.dumps({"architectures": ["FMDQwen2_5OmniForConditionalGeneration"]})]
    flags += ["--additional-config", json.dumps({"fork_merge_decoding": {"fork_layers": 7}})]
    model = str(write_full_model(MODEL, tmp_path / "full"))
    refused = Server(tmp_path / "log.txt", flags=flags, model=model, plain=True)
    try:
        assert "fork_layers=7 is out of range: the decoder has 6 layers" in refused.ended()
    finally:
        refused.stop()
