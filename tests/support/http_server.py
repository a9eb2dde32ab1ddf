"""`fmd-ext serve` in processes of its own, and requests to it."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fmd_ext.lab.trained import bundled_scenes
from fmd_ext.serve.environment import process_environment, server_command
from paths import ROOT

START_SECONDS = 600  # on two cores that others use, too
FLAGS = [
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"),
    *("--media-io-kwargs", json.dumps({"video": {"num_frames": -1, "fps": 2}})),
    *("--limit-mm-per-prompt", json.dumps({"video": 2, "audio": 2, "image": 2})),
    "--trust-request-mm-kwargs",
    *("--kv-cache-memory-bytes", str(256 * 2**20)),
]


def environment() -> dict[str, str]:
    """For processes of vLLM: this checkout, one thread each, none of them bound to a core; as many as users have."""
    mended = process_environment().get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    paths = os.pathsep.join(filter(None, [str(ROOT), mended]))
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own, "PYTHONPATH": paths}


class Server:
    """A running server. ``log``: the file that it writes to; ``plain``: vLLM without fork-merge decoding, of a full
    model; ``variables``: of its environment, beside those of `environment`."""

    def __init__(
        self,
        log: Path,
        *settings: str,
        flags: list[str] = FLAGS,
        model: str = "built-in",
        plain: bool = False,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        if plain:
            command = [*server_command(), model]
        else:
            command = [sys.executable, "-m", "fmd_ext", "serve", model, *settings]
        command += ["--port", str(self.port), *flags]
        with log.open("w") as written:
            self.process = subprocess.Popen(
                command,
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**environment(), **variables},
                start_new_session=True,
            )

    def wait(self) -> Server:
        """Until it answers. Raises RuntimeError with the end of its log when it ends instead, or takes too long."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"the server does not answer:\n{self.log.read_text()[-4000:]}")

    def ended(self) -> str:
        """What it wrote, for one that must refuse to start."""
        code = self.process.wait(START_SECONDS)
        assert code != 0, "it started and ended well"
        return self.log.read_text()

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def open(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps({"model": "fmd-ext", **body}).encode(),
            {"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)

    def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer, or status and the error's message."""
        try:
            with self.open(body) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    def answer(self, request: Request) -> list[str]:
        """Text of each choice."""
        if request.stream:
            with self.open({**request.body(), "stream": True}) as response:
                return ["".join(streamed(response))]
        status, content = self.post(request.body())
        assert status == 200, content
        return [choice["message"]["content"] for choice in content["choices"]]

    def answers(self, requests: list[Request], at_once: int) -> list[list[str]]:
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.answer, requests))

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            text = response.read().decode()
        return float(re.search(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)[1])

    def processes(self) -> dict[str, Any]:
        """Its processes as psutil has them: ``"server"``, and by their names the engine's core and its workers."""
        import psutil

        server = psutil.Process(self.process.pid)
        return {"server": server} | {
            child.name().removeprefix("VLLM::"): child for child in server.children(recursive=True)
        }

    def memory(self) -> dict[str, int]:
        """MiB that each of its processes has allocated. Pages of files are left out: they come and go with whoever else
        uses the same libraries."""
        found = {name: process.memory_info() for name, process in self.processes().items()}
        return {name: round((info.rss - info.shared) / 2**20) for name, info in found.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """What each of its processes has taken so far: of what it computes, whatever else the machine does."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes().items()}


def streamed(response: Any, empty: bool = False) -> Any:
    """The pieces of text of an answer in server-sent events; ``empty``: also those of tokens that show no text yet."""
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            choices = json.loads(line[6:])["choices"]
            text = choices[0]["delta"].get("content") if choices else None
            if text or (empty and choices and "role" not in choices[0]["delta"]):
                yield text or ""


@dataclasses.dataclass(frozen=True)
class Request:
    """Parts as in `served.Ask`, with the clip's file; ``options`` go into the request as they are."""

    question: str
    parts: tuple[tuple[str, int], ...] = ()
    stream: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def body(self) -> dict[str, Any]:
        content = []
        for kind, number in self.parts:
            kind = "video" if kind == "both" else kind
            content.append({"type": f"{kind}_url", f"{kind}_url": {"url": data_url(kind, clip_file(number))}})
        content.append({"type": "text", "text": self.question})
        options = {"temperature": 0, "max_tokens": 8, **dict(self.options)}
        if any(kind == "both" for kind, _ in self.parts):
            more = options.get("mm_processor_kwargs", {})
            options["mm_processor_kwargs"] = {"use_audio_in_video": True, **more}
        return {"messages": [{"role": "user", "content": content}], **options}


def clip_file(number: int) -> Path:
    return list(bundled_scenes())[number]


def data_url(kind: str, file: Path) -> str:
    return f"data:{kind}/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"


def mixed_requests(count: int) -> list[Request]:
    """Of all kinds, about all bundled clips; every tenth streams, every tenth is not forked."""
    layouts = [
        (),
        (("video", 0),),
        (("audio", 0),),
        (("video", 0), ("audio", 0)),
        (("audio", 0), ("video", 1)),
        (("both", 0),),
        (("video", 0), ("audio", 0), ("video", 1), ("audio", 1)),
    ]
    questions = ["What is making sound?", "What can be seen?", "Is the siren making sound in the audio?"]
    clips = len(bundled_scenes())
    requests = []
    for index in range(count):
        parts = tuple((kind, (index + shift) % clips) for kind, shift in layouts[index % len(layouts)])
        options = (("mm_processor_kwargs", {"fmd": False}),) if index % 10 == 3 and parts else ()
        requests.append(Request(questions[index % 3], parts, index % 10 == 6, options))
    return requests
