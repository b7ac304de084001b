"""The addresses of the server: what each takes, and how its answer leaves.

POST /v1/chat/completions   messages with pictures    GET /v1/models   the model
POST /v1/completions        a text as it stands       GET /health      200 while answers can be given
GET  /                      a page to chat with       GET /metrics     for Prometheus
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vlm_cli.serving.admission import check_key, check_model, parse_body, read_body, refuse
from vlm_cli.serving.engine import Busy, Stopping
from vlm_cli.serving.page import read_page
from vlm_cli.serving.preparing import Prepared
from vlm_cli.serving.replies import DONE, Reply, error_body, event
from vlm_cli.serving.requests import Ask, BadRequest, read_chat, read_completion
from vlm_cli.serving.row import Piece
from vlm_cli.serving.service import Service

__all__ = ["make_app"]


def make_app(service: Service) -> Starlette:
    """Return the application, for any ASGI server."""
    answer = {"/v1/chat/completions": (read_chat, True), "/v1/completions": (read_completion, False)}
    routes = [
        *(
            Route(path, partial(_answer, service, read, is_chat), methods=["POST"])
            for path, (read, is_chat) in answer.items()
        ),
        Route("/v1/models", partial(_models, service)),
        Route("/v1/models/{name:path}", partial(_model, service)),
        Route("/metrics", partial(_metrics, service)),
        Route("/health", partial(_health, service)),
        Route("/", partial(_page, service)),
    ]
    handlers: Any = {BadRequest: refuse, 404: _not_found, 405: _wrong_method, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers)


# -- small addresses ---------------------------------------------------------------------------------------------------


async def _models(service: Service, request: Request) -> Response:
    check_key(service, request)
    return JSONResponse({"object": "list", "data": [_describe(service)]})


async def _model(service: Service, request: Request) -> Response:
    check_key(service, request)
    check_model(service, request.path_params["name"])
    return JSONResponse(_describe(service))


def _describe(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "vlm"}


async def _health(service: Service, request: Request) -> Response:
    alive = service.engine.is_alive
    load = service.engine.load
    body = {"status": "ok" if alive else "failed", "running": load.running, "waiting": load.waiting}
    return JSONResponse(body, 200 if alive else 503)


async def _metrics(service: Service, request: Request) -> Response:
    check_key(service, request)
    text, kind = service.metrics.write(service.engine.load)
    return Response(text, headers={"content-type": kind})


async def _page(service: Service, request: Request) -> Response:
    page, policy = read_page(
        service.name,
        needs_key=service.api_key is not None,
        new_tokens=service.limits.new_tokens,
        temperature=service.temperature,
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return HTMLResponse(page, headers=headers)


# -- answers -----------------------------------------------------------------------------------------------------------


async def _answer(service: Service, read: Callable[..., Ask], is_chat: bool, request: Request) -> Response:
    """Read a request, let the engine answer it, and send the answer, whole or piece by piece."""
    check_key(service, request)
    body = await read_body(service, request)
    data = await run_in_threadpool(parse_body, body)
    check_model(service, data.get("model"))
    ask = read(data, service.limits, temperature=service.temperature)
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

    def tell(number: int, piece: Piece) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

    prepared = await run_in_threadpool(service.preparer.prepare, ask, tell)
    try:
        service.engine.submit(prepared.rows)
    except Busy as error:
        raise BadRequest(str(error), status=429, code="queue_full") from None
    except Stopping as error:
        raise BadRequest(str(error), status=503) from None
    reply = Reply(service.name, is_chat, prepared, service.spell)
    flow = _Flow(service, request, ask, prepared, reply, pieces)
    request.state.reply = reply
    return _EventStream(flow) if ask.streams else await flow.whole()


class _Flow:
    """The pieces of one request on their way to its client."""

    def __init__(
        self,
        service: Service,
        request: Request,
        ask: Ask,
        prepared: Prepared,
        reply: Reply,
        pieces: asyncio.Queue[tuple[int, Piece]],
    ) -> None:
        self.service, self.request, self.ask, self.reply = service, request, ask, reply
        self.prepared, self.pieces = prepared, pieces

    def cancel(self) -> None:
        """End the answers that nobody waits for."""
        for row in self.prepared.rows:
            row.cancelled.set()

    async def whole(self) -> Response:
        """Wait for all answers, and return them; stop if the client goes away.

        Raises:
            ClientDisconnect: if it did.
        """
        gone = asyncio.ensure_future(_wait_until_gone(self.request.receive))
        try:
            while not self.reply.is_over:
                piece = asyncio.ensure_future(self.pieces.get())
                await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    piece.cancel()
                    raise ClientDisconnect
                self.reply.add(*piece.result())
        finally:
            gone.cancel()
            if not self.reply.is_over:
                self.cancel()
        self.service.metrics.count_answer(self.reply)
        if problem := _problem_of(self.service, self.reply):
            status, message = problem
            return JSONResponse(error_body(message, status), status)
        return JSONResponse(self.reply.whole())

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of a stream."""
        for data in self.reply.opening():
            yield event(data)
        while not self.reply.is_over:
            number, piece = await self.pieces.get()
            self.reply.add(number, piece)
            if problem := _problem_of(self.service, self.reply):
                yield event(error_body(problem[1], problem[0]))
                break
            yield event(self.reply.chunk(number, piece))
        if self.ask.tells_usage:
            yield event(self.reply.closing())
        yield DONE
        self.service.metrics.count_answer(self.reply)


class _EventStream(Response):
    """Sends events while they come; ends the answers if the client goes away, or does not read what was sent."""

    media_type = "text/event-stream"

    def __init__(self, flow: _Flow) -> None:
        self.flow, self.status_code, self.background = flow, 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except (asyncio.TimeoutError, OSError):
            pass  # the client does not read, or its connection broke
        finally:
            for task in (sending, gone):
                task.cancel()
            if not self.flow.reply.is_over:
                self.flow.cancel()

    async def _send(self, send: Send) -> None:
        seconds = self.flow.service.limits.send_seconds
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await asyncio.wait_for(send(head), seconds)
        async for text in self.flow.events():
            body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
            await asyncio.wait_for(send(body), seconds)
        await asyncio.wait_for(send({"type": "http.response.body", "body": b""}), seconds)


async def _wait_until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _problem_of(service: Service, reply: Reply) -> tuple[int, str] | None:
    """Return status and words if an answer failed; its details are in the log of the server alone."""
    if "error" in reply.finishes:
        return 500, "the answer failed; the log of the server says why."
    if "timeout" in reply.finishes:
        return 504, f"the answer took more than {service.limits.seconds:g} seconds. Ask for fewer tokens."
    return None


# -- other errors ------------------------------------------------------------------------------------------------------


async def _not_found(request: Request, error: Exception) -> Response:
    words = "there is nothing at this address. Known: /v1/chat/completions, /v1/completions, /v1/models, /health."
    return JSONResponse(error_body(words, 404), 404)


async def _wrong_method(request: Request, error: Exception) -> Response:
    words = f"{request.method} is not possible at this address."
    return JSONResponse(error_body(words, 405), 405, headers=getattr(error, "headers", None))


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return PlainTextResponse("", 499)
    return JSONResponse(error_body("the server failed; its log says why.", 500), 500)
