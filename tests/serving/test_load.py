"""Many clients at once, some of which send nonsense or go away: no error of the server's, and no memory that grows."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.serving.conftest import ask_about

REQUESTS, CLIENTS = 500, 16
NAMES = ("one.png", "two.png", "three.png")


def leave(server, body: bytes) -> None:
    """Send a request that streams, and go away at its first bytes."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        client.recv(64)


@pytest.mark.matrix
def test_five_hundred_requests_of_sixteen_clients(run):
    with run(queue=64) as server:
        wanted = {name: server.chat(ask_about(name))[1]["choices"][0]["message"]["content"] for name in NAMES}
        memory = psutil.Process().memory_info

        def ask(k: int) -> str:
            draw = random.Random(k)
            name, what = draw.choice(NAMES), draw.random()
            if what < 0.1:
                body = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
                return f"bad {server.send('/v1/chat/completions', body)[0]}"
            if what < 0.2:
                leave(server, json.dumps({"messages": [ask_about(name)], "stream": True}).encode())
                return "left"
            status, reply = server.chat(ask_about(name))
            return "right" if reply["choices"][0]["message"]["content"] == wanted[name] else f"wrong {status} {reply}"

        with ThreadPoolExecutor(CLIENTS) as pool:
            first = list(pool.map(ask, range(100)))
            before = memory().rss
            found = first + list(pool.map(ask, range(100, REQUESTS)))
            grown = memory().rss - before
        assert set(found) == {"right", "left", "bad 400"}
        assert found.count("right") > 350
        server.wait_until(lambda: len(server.lines) == REQUESTS + len(NAMES))
        assert {line["status"] for line in server.lines} <= {200, 400, 499}
        load = server.service.engine.load
        server.wait_until(lambda: not load.running and not load.waiting)  # they end a step after their clients
        assert grown < 64 << 20
        assert load.largest == 8
