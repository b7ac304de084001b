"""A server of the demo in this process, and requests to it."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.support import ROOT
from vlm_cli import VLM, VLMProcessor, load
from vlm_cli.serving.server import make_server
from vlm_cli.serving.service import Service, make_service


def picture(name: str) -> str:
    data = (ROOT / "examples" / "images" / name).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask_about(name: str, text: str = "Describe the image.") -> dict[str, Any]:
    """A message with a picture."""
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": picture(name)}}, {"type": "text", "text": text}],
    }


@dataclass
class Running:
    """A server that runs.

    Attributes:
        port: where it listens.
        lines: of its log.
    """

    service: Service
    port: int
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, path: str, data: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of one request; a body that is no bytes is sent as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = data if isinstance(data, (bytes, type(None))) else json.dumps(data).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given = {"Content-Type": "application/json"} | given
        connection.request(method or ("GET" if body is None else "POST"), path, body, given)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text, dict(response.headers)

    def chat(self, *messages: Any, **more: Any) -> tuple[int, Any]:
        return self.send("/v1/chat/completions", {"messages": list(messages), **more})[:2]

    def wait_until(self, is_so: Callable[[], bool], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture(scope="session")
def demo() -> tuple[VLM, VLMProcessor]:
    return load("demo")


@contextmanager
def running(demo: tuple[VLM, VLMProcessor], *, host: str = "127.0.0.1", origins: tuple[str, ...] = (), **how: Any):
    lines: list[dict[str, Any]] = []
    service = make_service(*demo, "demo", log=lines.append, **how)
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(service, host=host, origins=origins)
    service.engine.start()
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield Running(service, listener.getsockname()[1], lines)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        service.engine.close()
        assert service.engine.join(30)
        listener.close()


@pytest.fixture(scope="module")  # other tests copy their process, which has no threads of a server then
def server(demo: tuple[VLM, VLMProcessor]) -> Iterator[Running]:
    with running(demo) as found:
        yield found


@pytest.fixture
def run(demo: tuple[VLM, VLMProcessor]) -> Callable[..., Any]:
    """Start a server with other settings."""
    return lambda **how: running(demo, **how)
