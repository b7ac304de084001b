"""What every request passes: its key, its body, the name of its model; and how one that does not pass is answered."""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vlm_cli.plain_data import parse_json
from vlm_cli.serving.replies import error_body
from vlm_cli.serving.requests import BadRequest
from vlm_cli.serving.service import Service

__all__ = ["check_key", "check_model", "parse_body", "read_body", "refuse"]

RETRY_SECONDS = 1  # that a client should wait when the queue is full
LINGER_SECONDS = 2.0  # in which a client may send the rest of a body that is refused


def check_key(service: Service, request: Request) -> None:
    """Compare the key in the same time, whatever it is.

    Raises:
        BadRequest: if it is another one.
    """
    if service.api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), service.api_key.encode())
    if scheme.lower() != "bearer" or not same:
        raise BadRequest(
            "the API key is missing or wrong. Send the header: Authorization: Bearer KEY.",
            status=401,
            code="invalid_api_key",
        )


def check_model(service: Service, name: Any) -> None:
    if name is not None and name != service.name:
        raise BadRequest(
            f"the model {str(name)[:100]!r} is not here. This server has {service.name!r}.",
            "model",
            404,
            "model_not_found",
        )


async def read_body(service: Service, request: Request) -> bytes:
    """Read the body of a request, which has to arrive in time and to be JSON.

    Raises:
        BadRequest: if it is too large, or takes too long.
    """
    limits = service.limits
    # A page of another origin may send other types to this server without asking.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("send JSON, with the header Content-Type: application/json.", status=415)
    too_large = BadRequest(f"the body has more than {limits.body >> 20} MB.", status=413, code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limits.body:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > limits.body:
                raise too_large

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        words = f"the body did not arrive within {limits.body_seconds:g} seconds."
        raise BadRequest(words, status=408) from None
    return bytes(body)


def parse_body(body: bytes) -> dict[str, Any]:
    try:
        data = parse_json(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8 text.") from None
    except ValueError as error:
        raise BadRequest(f"the body cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise BadRequest('the body must be a JSON object such as {"messages": […]}.')
    return data


async def refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    is_early = error.status in (408, 413)
    headers = {"connection": "close"} if is_early else {}
    headers |= {"retry-after": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if error.status == 401 else {}
    body = error_body(str(error), error.status, param=error.param, code=error.code)
    return (_EarlyRefusal if is_early else JSONResponse)(body, error.status, headers)


class _EarlyRefusal(JSONResponse):
    """An answer to a request whose body has not arrived: the rest is read and dropped for a while.

    Many clients read no answer before they have sent everything, and would only see that their connection broke.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drop_body(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _drop_body(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass
