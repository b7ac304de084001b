"""Run the application: a socket, a log line for each request, time limits of connections, and an orderly end."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm_cli.errors import UsageError
from vlm_cli.serving.app import make_app
from vlm_cli.serving.service import Service

__all__ = ["dump_line", "is_loopback", "make_server", "open_socket", "run"]

HEADER_SECONDS = 10.0  # in which a new connection has to send a request
CONNECTIONS = 512
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def is_loopback(host: str) -> bool:
    """Tell whether only programs of this machine reach a host."""
    return host in LOOPBACK


def open_socket(host: str, port: int) -> socket.socket:
    """Take a port, before the model is loaded.

    Raises:
        UsageError: if it is taken, or the host is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(CONNECTIONS)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Give another --port (0 takes a free one) or "
            "--host."
        ) from None
    return found


def run(service: Service, listener: socket.socket, *, host: str, origins: tuple[str, ...] = ()) -> None:
    """Serve until a signal; then finish what runs, and take nothing new."""
    service.engine.start()
    try:
        make_server(service, host=host, origins=origins).run(sockets=[listener])
    finally:
        service.engine.close()
        service.engine.join(service.limits.seconds)


def make_server(service: Service, *, host: str, origins: tuple[str, ...] = ()) -> uvicorn.Server:
    """Make a server; its engine is not started.

    Args:
        service: what the addresses need.
        host: where the server listens.
        origins: whose pages may use the server.
    """
    app: ASGIApp = make_app(service)
    if origins:
        app = CORSMiddleware(app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
    if is_loopback(host):
        # A page whose host name leads to this machine must not speak to the server as if it were its own.
        app = TrustedHostMiddleware(app, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    config = uvicorn.Config(
        _logged(app, service),
        http=_PromptProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(service.limits.seconds) + 1,
    )
    return uvicorn.Server(config)


class _PromptProtocol(H11Protocol):
    """Closes a connection that sends no whole request head in time: its first, and each one after that."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close_without_request)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()  # when the client has read the last answer
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)  # which it may never do


def _logged(app: ASGIApp, service: Service) -> ASGIApp:
    """Write one line for each request, when it has ended."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started, status = time.monotonic(), 499  # if the client goes away before an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope.setdefault("state", {})
        problem: str | None = None
        try:
            await app(scope, receive, watched)
        except ClientDisconnect:
            pass
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:500]
        seconds = time.monotonic() - started
        known = scope["path"] if "endpoint" in scope else "other"
        service.metrics.count_request(known, status, seconds)
        service.log(_describe(scope, status, seconds, problem))

    return run


def _describe(scope: Scope, status: int, seconds: float, problem: str | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
    }
    reply = scope["state"].get("reply")
    if reply is not None:
        line |= {
            "prompt_tokens": reply.prepared.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "images": len(reply.prepared.media),
            "first_token": None if reply.first_token is None else round(reply.first_token, 4),
            "finish": reply.finishes if len(reply.finishes) > 1 else reply.finishes[0],
        }
    return line if problem is None else {**line, "error": problem}


def dump_line(data: dict[str, Any]) -> str:
    """Write a line of the log as JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
