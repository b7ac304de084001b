"""Servers that trickle, loop, never end, or lead to another machine: vlm leaves each of them in time, in words."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.media.test_media import PNG, load_image, refusal
from vlm_cli import network
from vlm_cli.checkpoint.downloads import downloaded
from vlm_cli.errors import CheckpointError
from vlm_cli.network import HostRefused, is_internal, open_url

SECONDS = 1.0  # of the deadline in these tests
OK = b"HTTP/1.1 200 OK\r\n"


def trickle(send: Callable[[bytes], object], start: bytes, pause: float = 0.05) -> None:
    send(start)
    while True:
        send(b"x")
        time.sleep(pause)


def repeat(send: Callable[[bytes], object], start: bytes, again: bytes) -> None:
    send(start)
    while True:
        send(again)


def moved(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def slow_redirect(send: Callable[[bytes], object]) -> None:
    time.sleep(SECONDS / 3)
    send(moved("/slow-redirect"))


ANSWERS: dict[str, Callable[[Callable[[bytes], object], int], object]] = {
    "/cat.png": lambda send, port: send(OK + b"\r\n" + PNG),
    "/silent": lambda send, port: time.sleep(4 * SECONDS),
    "/slow-headers": lambda send, port: trickle(send, OK + b"X: "),
    "/drip": lambda send, port: trickle(send, OK + b"\r\n"),
    "/drip-chunks": lambda send, port: trickle(send, OK + b"Transfer-Encoding: chunked\r\n\r\n1;"),
    "/interim": lambda send, port: repeat(send, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "/endless": lambda send, port: repeat(send, OK + b"\r\n", bytes(65536)),
    "/endless-redirect": lambda send, port: repeat(send, moved("/cat.png")[:-21] + b"\r\n", bytes(65536)),
    "/loop": lambda send, port: send(moved("/loop")),
    "/slow-redirect": lambda send, port: slow_redirect(send),
    "/other-name": lambda send, port: send(moved(f"http://localhost:{port}/cat.png")),
    "/other-scheme": lambda send, port: send(moved("file:///etc/passwd")),
}


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    """A server that answers one request a connection, and stops sending when the other side leaves."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(network, "WAIT", SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    path = connection.recv(65536).split(b" ")[1].decode()
                    ANSWERS[path](connection.sendall, port)
                except (OSError, IndexError):
                    return

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{port}"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/silent", "cannot be fetched: it takes longer than"),
        ("/slow-headers", "cannot be fetched: it takes longer than"),
        ("/drip", "cannot be fetched: it takes longer than"),
        ("/drip-chunks", "cannot be fetched: it takes longer than"),
        ("/interim", "cannot be fetched: it takes longer than"),
        ("/slow-redirect", "cannot be fetched: it takes longer than"),
        ("/loop", "it redirects more than 10 times"),
        ("/endless", "is larger than"),
        ("/other-scheme", "begins with file:"),
        ("/other-name", "localhost (127.0.0.1) is an internal address"),
    ],
)
def test_a_hostile_server_is_left_in_time(server, path, words):
    started = time.monotonic()
    message = refusal(server + path, allow_urls=True, allow_hosts=("127.0.0.1",) if path != "/other-name" else ())
    if path == "/other-name":
        assert "--allow-host 127.0.0.1" in message  # the first hop is internal already
    else:
        assert words in message
    assert time.monotonic() - started < 3 * SECONDS


def test_the_body_of_a_redirect_is_not_read(server):
    started = time.monotonic()
    assert load_image(server + "/endless-redirect", allow_urls=True, allow_hosts=("127.0.0.1",)).size == (5, 3)
    assert time.monotonic() - started < SECONDS


def test_internal_hosts_need_the_flag_at_every_redirect(server, monkeypatch):
    for hosts in (("127.0.0.1",), ("LOCALHOST", "127.0.0.1")):  # a flag names a host or an address
        assert load_image(server + "/other-name", allow_urls=True, allow_hosts=hosts).size == (5, 3)
    here = server.replace("127.0.0.1", "localhost")
    assert load_image(here + "/cat.png", allow_urls=True, allow_hosts=("localhost",)).size == (5, 3)
    # The first hop is allowed, and the second has another name and another address.
    monkeypatch.setitem(ANSWERS, "/inside", lambda send, port: send(moved("http://169.254.169.254/latest/meta-data")))
    message = refusal(server + "/inside", allow_urls=True, allow_hosts=("127.0.0.1",))
    assert "169.254.169.254 is an internal address" in message and "--allow-host 169.254.169.254" in message


def test_the_checked_address_is_the_one_that_is_asked(server, monkeypatch):
    """A name server that gives a public address first and an internal one later gains nothing."""
    real, asked = socket.getaddrinfo, []

    def rebinding(host, port, *rest, **keywords):
        if host != "rebinding.example":
            return real(host, port, *rest, **keywords)
        asked.append(host)
        address = "192.0.2.1" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    address = server.replace("127.0.0.1", "rebinding.example")
    monkeypatch.setattr(network, "is_internal", lambda x: x == "127.0.0.1")
    with pytest.raises(OSError), open_url(address + "/cat.png") as download:  # 192.0.2.1 leads nowhere
        download.read(1)
    assert asked == ["rebinding.example"]
    with pytest.raises(HostRefused), open_url(address + "/cat.png"):
        pass


def test_a_slow_name_server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(network, "WAIT", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    started = time.monotonic()
    assert "takes longer than" in refusal("http://slow.example/a.png", allow_urls=True)
    assert time.monotonic() - started < 1


def test_behind_a_proxy(server, monkeypatch):
    """The proxy is the user's choice; internal names are refused all the same."""
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.setitem(ANSWERS, "http://unknown.invalid/cat.png", ANSWERS["/cat.png"])
    assert load_image("http://unknown.invalid/cat.png", allow_urls=True).size == (5, 3)
    for host in ("127.0.0.1", "10.0.0.1", "%31%32%37.0.0.1", "[::1]"):
        assert "is an internal address" in refusal(f"http://{host}/cat.png", allow_urls=True)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "0.0.0.0", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "%31%32%37.0.0.1", "127.1"]
)
def test_other_spellings_of_this_machine(host, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert "is an internal address" in refusal(f"http://{host}:1/a.png", allow_urls=True)


def test_internal_addresses():
    internal = ["10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.1.1", "224.0.0.1", "240.0.0.1", "::"]
    internal += ["fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "64:ff9b::a00:1", "2002:7f00:1::", "::ffff:10.0.0.1"]
    assert all(is_internal(x) for x in internal)
    assert not any(is_internal(x) for x in ("8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"))


def test_a_download_is_bounded_and_kept_only_if_it_is_right(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    hosts = frozenset({"127.0.0.1"})
    with (
        pytest.raises(CheckpointError, match="more than the 100,000 bytes"),
        downloaded(server + "/endless", key="a", most=100_000, allow_hosts=hosts),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="wrong hash"),
        downloaded(server + "/cat.png", key="a", most=10**6, allow_hosts=hosts) as path,
    ):
        assert path.read_bytes() == PNG
        raise RuntimeError("wrong hash")
    assert not [x for x in tmp_path.rglob("*") if x.is_file()]
    for _ in range(2):  # the second time without the network
        with downloaded(server + "/cat.png", key="a", most=10**6, allow_hosts=hosts) as path:
            assert path.read_bytes() == PNG
        hosts = frozenset()
    assert [x for x in tmp_path.rglob("*") if x.is_file()] == [path]
