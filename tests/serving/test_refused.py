"""What the server refuses, in which words, and that it goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
from starlette.responses import PlainTextResponse

from tests.serving.conftest import ask_about, picture
from vlm_cli.media import MediaLoader
from vlm_cli.serving.limits import Limits

HELLO = {"role": "user", "content": "hello"}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def shown(url):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


BAD = [
    (b"{", 400, "is not JSON"),
    (b"[]", 400, "must be a JSON object"),
    (b"\xff", 400, "not UTF-8"),
    (b"[" * 100_000, 400, "nested too deeply"),
    ({}, 400, "messages is missing"),
    (chat(), 400, "messages must be a list of 1 to 1,000 values"),
    (chat("hello"), 400, "messages[0] must be a mapping"),
    (chat({"role": "robot", "content": "x"}), 400, "messages[0].role is 'robot'. Known: system, developer, user"),
    (chat({"role": "user", "content": 7}), 400, "messages[0].content must be a text or a list of parts, but is 7"),
    (chat({"role": "user", "content": ""}), 400, "the prompt is empty"),
    (chat({"role": "user", "content": []}), 400, "the prompt is empty"),
    (chat({"role": "user", "content": ["x"]}), 400, "messages[0].content[0] must be a part"),
    (chat({"role": "user", "content": [{"type": "audio"}]}), 400, "type is 'audio'. Known: text, image_url"),
    (chat({"role": "user", "content": [{"type": "text"}]}), 400, "text must be a text, but is null"),
    (chat({"role": "user", "content": [{"type": "image_url"}]}), 400, "has no picture"),
    (chat(shown("")), 400, "has no picture"),
    (chat(shown("/etc/passwd")), 400, "the server opens no files"),
    (chat(shown("file:///etc/passwd")), 400, "the server opens no files"),
    (chat(shown("https://example.org/a.png")), 400, "fetches nothing unless you allow it"),
    (chat(shown("data:image/png;base64,AAAA")), 400, "is not an image that Pillow can read"),
    (chat({"role": "assistant", "content": "x"}), 400, "the last message has the role assistant"),
    (chat(HELLO, {"role": "system", "content": "x"}, HELLO), 400, "messages[1] is a system message"),
    (chat({**shown(picture("two.png")), "role": "system"}, HELLO), 400, "Images stand in messages of the user"),
    (chat(HELLO, temperature="hot"), 400, "temperature must be a number from 0 to 2"),
    (chat(HELLO, temperature=3), 400, "temperature must be a number from 0 to 2"),
    (chat(HELLO, n=0), 400, "n must be a whole number from 1 to 16"),
    (chat(HELLO, max_tokens=0), 400, "max_tokens must be a whole number"),
    (chat(HELLO, stop=[1]), 400, "stop must be a text"),
    (chat(HELLO, top_logprobs=2), 400, "top_logprobs needs logprobs"),
    (chat(HELLO, stream_options={}), 200, ""),
    (chat(HELLO, stream_options={"include_usage": True}), 400, "stream_options needs stream"),
    (chat(HELLO, tools=[{}]), 400, "the server calls no tools"),
    (chat(HELLO, response_format={"type": "json_object"}), 400, 'must be {"type": "text"}'),
    (chat(HELLO, logit_bias={"1": 2}), 400, "'logit_bias' is not known here"),
    (chat(HELLO, model="gpt"), 404, "This server has 'demo'"),
    (chat(*[shown(picture("two.png"))] * 65), 400, "has 65 images, and may have 64"),
    (chat({"role": "user", "content": shown("data:,")["content"] * 10_000}), 400, "has 10000 images"),
    (chat({"role": "user", "content": "a " * 5000}), 400, "positions"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_request_is_told_what_is_wrong(server, body, status, words):
    found, reply, _ = server.send("/v1/chat/completions", body if isinstance(body, bytes) else {"max_tokens": 1} | body)
    assert (found, words in json.dumps(reply, ensure_ascii=False).replace('\\"', '"')) == (status, True), reply
    if status != 200:
        assert set(reply["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/v1/models/x", "GET", 404)],
)
def test_an_address_that_is_not_there(server, path, method, status):
    assert server.send(path, method=method)[0] == status


@pytest.mark.parametrize(("headers", "status"), [({}, 401), ({"Authorization": "Bearer no"}, 401),
    ({"Authorization": "Basic key"}, 401), ({"Authorization": "Bearer key"}, 200)])  # fmt: skip
def test_a_key(run, headers, status):
    with run(api_key="key") as server:
        hello = chat(HELLO, max_tokens=1)
        for path, body in (("/v1/chat/completions", hello), ("/v1/models", None), ("/metrics", None)):
            assert server.send(path, body, **headers)[0] == status
        assert server.send("/health")[0] == 200


def test_pages_of_other_origins_are_kept_out(server, run):
    assert server.send("/v1/chat/completions", chat(HELLO), Content_Type="text/plain")[0] == 415
    assert server.send("/health", Host="evil.example")[0] == 400  # a name that leads to this machine
    assert "access-control-allow-origin" not in server.send("/health", Origin="https://a.example")[2]
    with run(origins=("https://a.example",)) as other:
        allowed = [other.send("/health", Origin=f"https://{x}.example")[2] for x in "ab"]
        assert [x.get("access-control-allow-origin") for x in allowed] == ["https://a.example", None]


@pytest.mark.parametrize(("allowed", "requests"), [((), 0), (("127.0.0.1",), 1)])
def test_an_internal_address_is_fetched_only_if_its_host_is_named(run, allowed, requests):
    with run(make_loader=partial(MediaLoader, allow_urls=True, allow_hosts=allowed)) as server:
        status, _ = server.chat(shown(f"http://127.0.0.1:{server.port}/health"))
        assert status == 400  # the answer there is no image
        assert sum(line["path"] == "/health" for line in server.lines) == requests


def test_a_large_body_is_refused_before_it_is_read(run):
    with run(limits=Limits(body=1 << 20)) as server:
        assert server.send("/v1/chat/completions", b" " * (64 << 20))[0] == 413
        with socket.create_connection(("127.0.0.1", server.port)) as client:  # no length is announced
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
                           b"Content-Type: application/json\r\n\r\n")  # fmt: skip
            chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            try:
                for _ in range(64):
                    client.sendall(chunk)
                    time.sleep(0.001)
            except OSError:
                pass  # the server closed the connection
        assert server.send("/health")[0] == 200
        server.wait_until(lambda: 413 in [line["status"] for line in server.lines[1:]])


@pytest.mark.matrix
def test_a_full_queue_is_told_when_to_come_back(run):
    with run(queue=1, batch_size=1) as server:
        statuses = []
        body = chat(HELLO, max_tokens=60, stop=["\0"])
        ask = lambda: statuses.append(server.send("/v1/chat/completions", body))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for status, _, _ in statuses} == {200, 429}
        assert all(headers.get("retry-after") == "1" for status, _, headers in statuses if status == 429)


def slow(server):
    """A request whose body comes a byte at a time."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n"
        )
        client.settimeout(0.1)
        for _ in range(100):
            client.sendall(b" ")
            try:
                return client.recv(4096)
            except TimeoutError:
                continue
    return b""


@pytest.mark.matrix
def test_a_body_that_never_ends_is_left(run):
    with run(limits=Limits(body_seconds=0.3)) as server:
        assert slow(server).startswith(b"HTTP/1.1 408")


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.sample(1)
@pytest.mark.parametrize("before", [b"", HEALTH])
def test_a_connection_whose_request_never_ends_is_closed(run, monkeypatch, before):
    from vlm_cli.serving import server as module

    monkeypatch.setattr(module, "HEADER_SECONDS", 0.2)
    with run() as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(10)
        client.sendall(before + b"GET / HT")
        received = b"".join(iter(partial(client.recv, 4096), b""))
        assert received.count(b"200 OK") == (1 if before else 0)


@pytest.mark.matrix
def test_a_client_that_does_not_read_its_answer_is_left(run, monkeypatch):
    from vlm_cli.serving import server as module

    monkeypatch.setattr(module, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(module, "make_app", lambda service: PlainTextResponse("x" * (32 << 20)))
    with run() as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(HEALTH)
        client.recv(1)
        time.sleep(0.6)
        client.settimeout(10)
        read = 1
        with suppress(ConnectionResetError):
            while piece := client.recv(1 << 20):
                read += len(piece)
        assert read < 32 << 20


LONG = chat(ask_about("two.png"), max_tokens=400, temperature=2, seed=1, presence_penalty=2)


def test_a_client_that_goes_away_frees_its_place(run, demo):
    with run(batch_size=1, limits=Limits(seconds=60)) as server:
        body = json.dumps(LONG | {"stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert b"200 OK" in client.recv(4096)
        server.wait_until(lambda: server.service.engine.load.running == 0)
        assert server.chat(HELLO, max_tokens=1)[0] == 200
        server.wait_until(lambda: len(server.lines) == 2)
        assert server.lines[0]["finish"] is None and server.lines[0]["completion_tokens"] < 100


def test_an_answer_that_takes_too_long_is_ended(run):
    with run(limits=Limits(seconds=0.05)) as server:
        status, reply = server.chat(LONG["messages"][0], max_tokens=400, temperature=2, presence_penalty=2, seed=1)
        assert status == 504 and "more than 0.05 seconds" in reply["error"]["message"]


def test_an_answer_that_fails_says_so_and_the_next_one_works(run, monkeypatch):
    told = []
    with run(tell=told.append) as server:
        model = server.service.engine.model
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "generate", lambda *args, **kwargs: 1 / 0)
            status, reply = server.chat(HELLO)
        assert status == 500 and "division" not in reply["error"]["message"] and "division" in told[0]
        assert server.chat(HELLO, max_tokens=1)[0] == 200
