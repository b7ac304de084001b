"""Answers in the form of OpenAI's protocol: whole, or as the events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_cli.serving.preparing import Prepared
from vlm_cli.serving.row import Piece
from vlm_cli.serving.sampling import TokenChance

__all__ = ["Reply", "error_body", "event"]

DONE = "data: [DONE]\n\n"


@dataclass
class Reply:
    """The reply to one request, which grows with each piece.

    Args:
        model: name of the model.
        is_chat: whether the request has messages.
        prepared: its rows.
        spell: turns a token into its text and bytes, for probabilities.

    Attributes:
        texts: of the answers so far.
        finishes: why each answer ended; None while it goes on.
        first_token: seconds until the first piece; None before it.
    """

    model: str
    is_chat: bool
    prepared: Prepared
    spell: Callable[[int], tuple[str, bytes]]
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None

    def __post_init__(self) -> None:
        count = len(self.prepared.rows)
        self.texts, self.finishes = [""] * count, [None] * count  # type: list[str], list[str | None]
        self.new_tokens, self.chances = [0] * count, [[] for _ in range(count)]  # type: ignore[var-annotated]
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @property
    def is_over(self) -> bool:
        return all(finish is not None for finish in self.finishes)

    @property
    def completion_tokens(self) -> int:
        return sum(self.new_tokens)

    def add(self, number: int, piece: Piece) -> None:
        """Add a piece of one answer."""
        if self.first_token is None and piece.new_tokens:
            self.first_token = time.monotonic() - self.started
        self.texts[number] += piece.text
        self.chances[number] += piece.chances
        self.new_tokens[number] = max(piece.new_tokens, self.new_tokens[number])
        self.finishes[number] = piece.finish

    def whole(self) -> dict[str, Any]:
        """Return the reply of a request that does not stream."""
        choices = []
        for i, text in enumerate(self.texts):
            choice: dict[str, Any] = {"index": i, "finish_reason": self.finishes[i]}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                choice["logprobs"] = self._chat_chances(self.chances[i])
            else:
                choice["text"] = text
                choice["logprobs"] = self._text_chances(self.chances[i])
            choices.append(choice)
        return {**self._head(streams=False), "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Return the events with which a stream begins."""
        if not self.is_chat:
            return []
        return [self._chunk(i, {"role": "assistant", "content": ""}, None, ()) for i in range(len(self.texts))]

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the event for a piece."""
        delta: Any = ({"content": piece.text} if piece.text else {}) if self.is_chat else piece.text
        return self._chunk(number, delta, piece.finish, piece.chances)

    def closing(self) -> dict[str, Any]:
        """Return the event with the numbers of tokens."""
        return {**self._head(streams=True), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Count tokens: of a prompt, each image with all of its positions, and (`vlm`) those of each image."""
        return {
            "prompt_tokens": self.prepared.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prepared.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"image_tokens": sum(self.prepared.media_tokens)},
            "vlm": {"image_tokens": self.prepared.media_tokens},
        }

    def _head(self, *, streams: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if streams else "chat.completion") if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, number: int, delta: Any, finish: str | None, chances: Sequence[TokenChance]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "finish_reason": finish}
        if self.is_chat:
            choice |= {"delta": delta, "logprobs": self._chat_chances(chances)}
        else:
            choice |= {"text": delta, "logprobs": self._text_chances(chances)}
        return {**self._head(streams=True), "choices": [choice]}

    def _chat_chances(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not chances:
            return None
        return {
            "content": [
                {
                    **self._spelled(chance.token, chance.logprob),
                    "top_logprobs": [self._spelled(token, logprob) for token, logprob in chance.others],
                }
                for chance in chances
            ]
        }

    def _text_chances(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not chances:
            return None
        return {
            "tokens": [self.spell(chance.token)[0] for chance in chances],
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [{self.spell(token)[0]: x for token, x in chance.others} for chance in chances],
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.spell(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


def event(data: Mapping[str, Any]) -> str:
    """Write an event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
