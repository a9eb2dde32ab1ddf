"""Models of the hub where it cannot be reached: seconds, one line, no retries."""

from __future__ import annotations

import http.server
import socket
import threading
import time

import huggingface_hub
import pytest

from fmd_ext.cli import models


class TestHub:
    """A hub that is out of reach: at a port where nobody listens, or one where nobody answers."""

    @pytest.fixture(params=["refused", "silent"])
    def hub(self, request, monkeypatch):
        listener = socket.create_server(("127.0.0.1", 0))
        if request.param == "refused":
            listener.close()
        endpoint = (
            f"http://127.0.0.1:{listener.getsockname()[1]}" if request.param == "silent" else "http://127.0.0.1:9"
        )
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(models, "HUB_SECONDS", 1)
        yield
        listener.close()

    def test_a_name_that_is_not_in_the_cache(self, fmd, folder, hub):
        start = time.monotonic()
        code, out, err = fmd("ask", folder / "clip.mp4", "What?", "--model", "nobody/nothing")
        assert time.monotonic() - start < 10 and (code, out) == (2, "") and len(err.splitlines()) == 1
        assert "model nobody/nothing: no such folder, not in the cache, and the hub cannot be reached: " in err

    def test_a_name_that_is_in_the_cache(self, hub, monkeypatch, capsys):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
        with models.reachable("somebody/something"):
            assert huggingface_hub.is_offline_mode()
        assert not huggingface_hub.is_offline_mode()
        assert "somebody/something comes from the cache" in capsys.readouterr().err

    def test_a_hub_that_answers_is_used(self, monkeypatch):
        class Answers(http.server.BaseHTTPRequestHandler):
            do_HEAD = lambda self: (self.send_response(404), self.end_headers())  # noqa: E731
            log_message = lambda *arguments: None  # noqa: E731

        with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
            with models.reachable("somebody/something"):
                assert not huggingface_hub.is_offline_mode()
