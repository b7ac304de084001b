"""What a server takes of one request, and of all together."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The most that requests may use.

    Attributes:
        body: bytes of a request.
        images: images and clips of a request.
        answers: of a request (`n`, times its prompts).
        new_tokens: of an answer that asks for no number.
        most_new_tokens: that an answer may ask for.
        seconds: from the arrival of a request to the end of its answers.
        body_seconds: in which the body has to arrive.
        send_seconds: in which a client has to read what was sent.
        messages: of a conversation.
    """

    body: int = 32 * MEGABYTE
    images: int = 64
    answers: int = 16
    new_tokens: int = 256
    most_new_tokens: int = 100_000
    seconds: float = 300.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    messages: int = 1_000
