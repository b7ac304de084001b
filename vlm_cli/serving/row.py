"""One answer of a request, on its way through the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.generation.rows import Row
from vlm_cli.generation.stopping import cut_at_stop
from vlm_cli.generation.text_stream import TextStream
from vlm_cli.serving.sampling import RowSampler, Sampling, TokenChance

__all__ = ["Finish", "Piece", "ServedRow"]

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True)
class Piece:
    """What the engine tells about an answer.

    Attributes:
        text: that is new; may be empty.
        chances: of the tokens that are new, if the request asks for probabilities.
        finish: why the answer ended; None while it goes on.
        new_tokens: of the answer so far.
    """

    text: str = ""
    chances: tuple[TokenChance, ...] = ()
    finish: Finish | None = None
    new_tokens: int = 0


@dataclass(eq=False, kw_only=True)
class ServedRow(Row):
    """A row that tells its answer while the model writes it.

    Args:
        stops: texts that end the answer.
        sampling: how tokens are chosen.
        tell: receives each piece, in the thread of the engine; the last one has a `finish`.
        deadline: of `time.monotonic`, at which the answer ends.
    """

    stops: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)
    tell: Callable[[Piece], None] = lambda piece: None
    deadline: float = float("inf")
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_over: bool = False

    def begin(self, plan: GenerationPlan, stop_ids: set[int]) -> None:
        """Prepare for the first token."""
        self._texts: list[str] = []
        self._stream = TextStream(plan.decode, self._texts.append, self.stops)
        self._stream.prompt, self._stream.prompt_is_over = self.ids, True
        self._plan, self._stop_ids = plan, stop_ids
        self.sampler = RowSampler(self.sampling)

    @property
    def has_begun(self) -> bool:
        """Whether a part of the answer is told already."""
        return bool(self._stream.ids)

    def reason_to_leave(self) -> Finish | None:
        """Why the row need not be answered any longer; None if it does."""
        if self.cancelled.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() > self.deadline else None

    def take(self, token: int) -> bool:
        """Receive the next token, tell what it adds, and say whether the answer is over."""
        chance = self.sampler.take(token)
        stream = self._stream
        finish: Finish | None = self.reason_to_leave()
        if token in self._stop_ids:
            stream.ids.append(token)
            finish = "stop"
        else:
            stream.add([token])
            if self.stops:
                text = self._plan.decode(self.ids, stream.ids)
                finish = "stop" if cut_at_stop(text, self.stops) != text else finish
            finish = finish or ("length" if len(stream.ids) >= self.room else None)
        if finish is not None:
            stream.end()
        self._say(() if chance is None else (chance,), finish)
        return self.is_over

    def fail(self, finish: Finish) -> None:
        """End the row without another token."""
        if not self.is_over:
            self.is_over = True
            self.tell(Piece(finish=finish))

    def _say(self, chances: tuple[TokenChance, ...], finish: Finish | None) -> None:
        text = "".join(self._texts)
        self._texts.clear()
        self.is_over = finish is not None
        if text or chances or finish is not None:
            self.tell(Piece(text, chances, finish, len(self._stream.ids)))
