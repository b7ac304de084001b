"""Text as it is generated, without what is not text: half characters and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.streamers import BaseStreamer

from vlm_cli.generation.decoder import cut_at_stop

__all__ = ["TextStream", "write_text"]


class TextStream(BaseStreamer):
    """Writes new text as soon as it is certain.

    Held back until later tokens decide: bytes of an unfinished character, and what may become a stop string.

    Args:
        decode: token ids to text.
        write: is given each piece.
        stops: stop strings.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], Any], stops: Sequence[str]) -> None:
        self.decode, self.write, self.stops = decode, write, stops
        self.ids: list[int] = []
        self.written = ""
        self.prompt_is_over = False

    def put(self, value: Any) -> None:
        if not self.prompt_is_over:  # the first call brings the prompt
            self.prompt_is_over = True
            return
        self.ids += value.reshape(-1).tolist()
        self._advance(self._certain(self.decode(self.ids)))

    def end(self) -> None:
        self._advance(cut_at_stop(self.decode(self.ids), self.stops))

    def _certain(self, text: str) -> str:
        cut = cut_at_stop(text, self.stops)
        if cut != text:
            return cut
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        return text[: len(text) - held]

    def _advance(self, text: str) -> None:
        # A tokenizer may change its mind about text that it gave (clean-up of spaces); what is out stays out.
        if len(text) > len(self.written) and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def write_text(text: str) -> None:
    """Print a piece of an answer on stdout, at once."""
    print(text, end="", flush=True)
