"""The requests of a file, in the form of OpenAI's batch files, answered as `vlm serve` answers them.

    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}
    {"id": "batch_req_…", "custom_id": "7", "response": {"status_code": 200, "request_id": "req_…", "body": {…}},
     "error": null}

A request that a server would refuse has the server's status and error as its response; a line that is no request has an
"error". Source: https://platform.openai.com/docs/guides/batch.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_cli.data.sources import Row
from vlm_cli.errors import VLMError
from vlm_cli.generation.answers import Counts
from vlm_cli.prompt import Medium
from vlm_cli.schema import show
from vlm_cli.serving.engine import Engine
from vlm_cli.serving.preparing import Preparer
from vlm_cli.serving.replies import Reply, error_body
from vlm_cli.serving.requests import Ask, BadRequest, read_chat, read_completion
from vlm_cli.serving.spelling import Speller

__all__ = ["AnsweredRequest", "RequestAnswerer"]

BATCHES_AHEAD = 4  # batches of answers that may wait for the model
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SECONDS = 0.1  # between two looks at whether the engine lives


class BadLine(VLMError):
    """A line that is no request.

    Attributes:
        code: OpenAI's name of the error.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class AnsweredRequest:
    """A row of the file, and what became of it.

    Attributes:
        origin: the row.
        model: that the request names; None if it names none.
        reply: with the answers, which grow until `done`.
        error: why there are none.
    """

    origin: Row
    model: str | None = None
    reply: Reply | None = None
    error: BadRequest | BadLine | None = None
    done: threading.Event = field(default_factory=threading.Event)
    ids: tuple[str, str] = field(default_factory=lambda: (uuid.uuid4().hex, uuid.uuid4().hex))

    @property
    def is_cut(self) -> bool:
        """Whether its length has ended an answer."""
        return self.reply is not None and "length" in self.reply.finishes

    def to_dict(self) -> dict[str, Any]:
        """Return the line of the output."""
        response: dict[str, Any] | None = None
        error: dict[str, Any] | None = None
        if isinstance(self.error, BadLine):
            error = {"code": self.error.code, "message": str(self.error)}
        else:
            status, body = self._answer()
            response = {"status_code": status, "request_id": f"req_{self.ids[1]}", "body": body}
        name = self.origin.data.get("custom_id")
        custom_id = name if isinstance(name, str) else None
        return {"id": f"batch_req_{self.ids[0]}", "custom_id": custom_id, "response": response, "error": error}

    def _answer(self) -> tuple[int, dict[str, Any]]:
        if isinstance(self.error, BadRequest):
            problem = self.error
            return problem.status, error_body(str(problem), problem.status, param=problem.param, code=problem.code)
        assert self.reply is not None
        if "error" in self.reply.finishes:
            return 500, error_body("the answer failed; the log says why.", 500)
        return 200, self.reply.whole()


class RequestAnswerer:
    """Answers the requests of a file together, and returns them in their order.

    Args:
        engine: that answers; it is started and closed here.
        preparer: makes rows of requests.
        name: of the model, in the answers.
        defaults: keys that a request gets where its body lacks them; the number of its row is added to a seed.
        first: for each id, the place of the row that has it first, as `note_ids` finds it.

    Attributes:
        counts: what was done so far.
    """

    def __init__(
        self, engine: Engine, preparer: Preparer, name: str, defaults: Mapping[str, Any], first: Mapping[str, str]
    ) -> None:
        self.engine, self.preparer, self.name = engine, preparer, name
        self.defaults, self.first = dict(defaults), first
        self.counts = Counts()
        self.spell = Speller(preparer.plan.processor.tokenizer)

    def answer(self, rows: Iterator[Row]) -> Generator[AnsweredRequest]:
        """Yield each request when it and all before it are answered."""
        engine = self.engine
        most = BATCHES_AHEAD * engine.batch_size
        waiting: deque[AnsweredRequest] = deque()
        engine.start()
        try:
            for row in rows:
                waiting.append(self._begin(row))
                while waiting and (waiting[0].done.is_set() or engine.load.waiting + engine.load.running >= most):
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())
        finally:
            for request in waiting:
                for served in request.reply.prepared.rows if request.reply else ():
                    served.cancelled.set()
            engine.close()
            engine.join()

    def _begin(self, row: Row) -> AnsweredRequest:
        """Read a request, and let its answers wait for the model."""
        request = AnsweredRequest(row)
        try:
            url, body = self._read_line(row)
            request.model = body.pop("model", None)
            ask = self._read_body(url, body, row.number)

            def tell(number: int, piece: Any) -> None:
                assert request.reply is not None
                request.reply.add(number, piece)
                if request.reply.is_over:
                    request.done.set()

            prepared = self.preparer.prepare(ask, tell)
            request.reply = Reply(self.name, url == CHAT, prepared, self.spell)
            self.engine.submit(prepared.rows)
        except (BadRequest, BadLine) as error:
            request.error = error.with_traceback(None)
            request.done.set()
        return request

    def _finish(self, request: AnsweredRequest) -> AnsweredRequest:
        """Wait until a request is answered."""
        while not request.done.wait(SECONDS):
            if not self.engine.is_alive:
                raise VLMError("the engine that answers requests has ended.")
        if request.reply is not None:
            self.counts.rows += 1
            self.counts.new_tokens += request.reply.completion_tokens
            self.counts.images += len(request.reply.prepared.media)
            self.counts.encoded = self.engine.media.encoded
        return request

    def _read_line(self, row: Row) -> tuple[str, dict[str, Any]]:
        """Return the address of a request and its body.

        Raises:
            BadLine: if the row is no request.
        """
        if row.problem is not None:
            raise BadLine(f"{row.unit} {row.number}: {row.problem}", "invalid_json_line")
        place, data = f"{row.unit} {row.number}", row.data
        name, url, body = data.get("custom_id"), data.get("url"), data.get("body")
        if not isinstance(name, str) or not name:
            raise BadLine(
                f"{place}: custom_id must be a text that is not empty, got {show(name)}.", "invalid_custom_id"
            )
        if (first := self.first.get(name, row.place)) != row.place:
            raise BadLine(f"{place}: {first} has the custom_id {show(name)} already.", "duplicate_custom_id")
        if data.get("method") != "POST":
            raise BadLine(f"{place}: method must be 'POST', got {show(data.get('method'))}.", "invalid_method")
        if url not in (CHAT, COMPLETION):
            raise BadLine(f"{place}: url must be {CHAT} or {COMPLETION}, got {show(url)}.", "invalid_url")
        if not isinstance(body, dict):
            raise BadLine(f"{place}: body must be an object, got {show(body)}.", "invalid_body")
        return url, dict(body)

    def _read_body(self, url: str, body: dict[str, Any], number: int) -> Ask:
        """Return what a request asks for.

        Raises:
            BadRequest: as a server refuses it, and for a stream.
        """
        if body.get("stream"):
            raise BadRequest("stream is true, but a file holds whole answers. Leave stream out.", "stream")
        filled = {key: x for key, x in self.defaults.items() if body.get(key) is None}
        if "seed" in filled:
            filled["seed"] += number
        read, more = (read_chat, {"opens_files": True}) if url == CHAT else (read_completion, {})
        ask = read({**body, **filled}, self.preparer.limits, temperature=0.0, **more)
        parts = [part for prompt in ask.prompts if not isinstance(prompt, str) for x in prompt for part in x.parts]
        if any(isinstance(part, Medium) and part.is_stdin for part in parts):
            raise BadRequest("the image '-' means standard input, which the rows of a file cannot share.", "messages")
        return ask
