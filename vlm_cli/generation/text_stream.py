"""Print an answer while the model writes it, without half characters and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.streamers import BaseStreamer

from vlm_cli.decoding import HALF
from vlm_cli.generation.stopping import cut_at_stop

__all__ = ["TextStream"]


class TextStream(BaseStreamer):
    """Writes new text as soon as later tokens cannot change it.

    The bytes of an unfinished character wait, and so does text that may become a stop string.

    Args:
        decode: turns the tokens of the prompt, and new tokens, into the new text.
        write: receives each piece of text.
        stops: stop strings.
    """

    def __init__(
        self, decode: Callable[[Sequence[int], Sequence[int]], str], write: Callable[[str], Any], stops: Sequence[str]
    ) -> None:
        self.decode, self.write, self.stops = decode, write, stops
        self.prompt: list[int] = []
        self.ids: list[int] = []
        self.written = ""
        self.prompt_is_over = False

    def put(self, value: Any) -> None:
        """Receive the tokens of the prompt at the first call, and new tokens after that."""
        if not self.prompt_is_over:
            self.prompt_is_over = True
            self.prompt = value.reshape(-1).tolist()
            return
        self.add(value.reshape(-1).tolist())

    def add(self, ids: Sequence[int]) -> None:
        """Receive new tokens, and write what they make certain."""
        self.ids += ids
        self._advance(self._certain(self.decode(self.prompt, self.ids)))

    def end(self) -> None:
        """Write what is left."""
        self._advance(cut_at_stop(self.decode(self.prompt, self.ids), self.stops))

    def _certain(self, text: str) -> str:
        """Return the beginning of a text that later tokens cannot change."""
        cut = cut_at_stop(text, self.stops)
        if cut != text:
            return cut
        text = text.rstrip(HALF)
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        return text[: len(text) - held]

    def _advance(self, text: str) -> None:
        # A tokenizer may decode earlier tokens in another way now (clean-up of spaces); printed text stays as it is.
        if len(text) > len(self.written) and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
