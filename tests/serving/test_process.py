"""The server as a process: its start, and its end at a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from functools import partial

import pytest

from tests.support.command import fork
from vlm_cli.cli.app import main

WORDS = ["vlm", "serve", "demo", "--port", "0"]
LONG = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 300, "temperature": 2, "seed": 1, "n": 2}


def serve() -> int:
    sys.argv = WORDS
    return main()


def request(port: int, body: dict) -> socket.socket:
    """A connection on which a request was sent."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + data)
    return client


def ask(port: int, path: str) -> socket.socket:
    """A connection on which an address was asked for."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    return client


def read(client: socket.socket) -> bytes:
    """All that a server still sends on a connection."""
    with client:
        return b"".join(iter(partial(client.recv, 1 << 16), b""))


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_and_refuses_what_comes(tmp_path, number):
    reader, writer = os.pipe()
    with open(os.devnull, "r+") as nothing:
        pid = fork(serve, (nothing.fileno(), nothing.fileno(), writer), tmp_path, {})
    os.close(writer)
    with os.fdopen(reader) as notes:
        port = next(int(found[1]) for line in notes if (found := re.search(r"at http://127.0.0.1:(\d+)", line)))
        running = request(port, LONG | {"stream": True})
        begun = running.recv(1 << 16)
        waiting = request(port, LONG)  # the model answers one group after the other
        while b'"content":"' not in begun:
            begun += running.recv(1 << 16)
        while b"vlm_answers_waiting 2.0" not in (told := read(ask(port, "/metrics"))):
            assert b"vlm_answers_running 2.0" in told, "the first answers ended before the others waited"
        os.kill(pid, number)
        with pytest.raises(ConnectionRefusedError):
            while True:
                socket.create_connection(("127.0.0.1", port)).close()
        streamed = begun + read(running)
        answered = read(waiting)
        assert b"data: [DONE]" in streamed and streamed.count(b'"finish_reason":"') == 2
        assert answered.startswith(b"HTTP/1.1 200 OK") and answered.count(b'"finish_reason":"') == 2
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number
        told = [json.loads(line) for line in notes.read().splitlines() if line.startswith("{")]
        assert [entry["status"] for entry in told if entry["path"] == "/v1/chat/completions"] == [200, 200]


def test_a_taken_port_is_told_before_the_model_is_loaded(vlm, monkeypatch):
    monkeypatch.setattr("vlm_cli.cli.loading.ModelRequest.load", lambda self: 1 / 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = vlm("serve", "demo", "--port", port)
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Give another --port" in result.stderr


def test_a_model_larger_than_memory_is_refused(vlm, monkeypatch):
    monkeypatch.setattr("vlm_cli.checkpoint.size_limits._all_memory", lambda: 1000)
    result = vlm("serve", "demo", "--port", "0")
    assert result.exit_code == 1 and "this machine has 0.0 GB of memory. Choose a smaller model" in result.stderr


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")])
def test_lack_of_memory_is_told_with_what_to_do(vlm, monkeypatch, error):
    def load(self):
        raise error

    monkeypatch.setattr("vlm_cli.cli.loading.ModelRequest.load", load)
    result = vlm("serve", "demo", "--port", "0")
    assert result.exit_code == 1 and result.stderr.startswith("Error: memory does not suffice (")
    assert "--dtype bfloat16, --quantize" in result.stderr
