"""The engine: one thread owns the model, and answers requests that wait together.

    submit ──► waiting ──► chosen: similar lengths, as many as memory allows ──► generate ──► pieces of each answer

B rows, L positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vlm_cli.errors import VLMError, first_line, is_out_of_memory
from vlm_cli.generation.batch_media import BatchMedia
from vlm_cli.generation.choosing import RowChooser
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.modeling.batching import pad_left
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.serving.row import ServedRow

__all__ = ["Busy", "Engine", "Stopping"]

GATHER_SECONDS = 0.01  # that the first of several requests waits for others that come at the same time


class Busy(VLMError):
    """As many answers wait as may wait."""


class Stopping(VLMError):
    """The server takes no more requests."""


@dataclass
class Load:
    """What the engine does now, and what it has done.

    Attributes:
        running: answers that the model writes now.
        waiting: answers that wait for it.
        batches: groups of answers that were written together.
        rows: answers that ended.
        largest: answers of the largest group.
    """

    running: int = 0
    waiting: int = 0
    batches: int = 0
    rows: int = 0
    largest: int = 0


class Engine:
    """Answers rows in a thread of its own.

    Args:
        plan: of the model. Its keywords hold for every row; how tokens are chosen, each row says itself.
        batch_size: answers that are written together, at most.
        queue: answers that may wait.
        tell: receives what whoever runs the server should know.
    """

    def __init__(
        self, plan: GenerationPlan, *, batch_size: int, queue: int, tell: Callable[[str], None] = lambda message: None
    ) -> None:
        self.plan, self.model, self.batch_size, self.queue, self.tell = plan, plan.model, batch_size, queue, tell
        self.load = Load()
        self.media = BatchMedia(self.model)
        self.chooser = RowChooser(plan)
        may_share = self.media.encodes_apart and self.chooser.most != 1
        self._cache = PromptCache() if may_share else None  # of a chat, the next turn computes only what is new
        self._stop_ids = set(stop_token_ids(self.model.generation_config))
        self._waiting: deque[ServedRow] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vlm-engine", daemon=True)

    # -- for other threads ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, rows: Sequence[ServedRow]) -> None:
        """Let rows wait for the model. Each tells its pieces, the last of which has a `finish`.

        Raises:
            Busy: if too many rows wait.
            Stopping: after `close`.
        """
        with self._changed:
            if self._closed:
                raise Stopping("the server is stopping and takes no more requests.")
            if self._waiting and len(self._waiting) + len(rows) > self.queue:
                raise Busy(f"{len(self._waiting)} answers wait already, of at most {self.queue}. Try again later.")
            self._waiting += rows
            self.load.waiting = len(self._waiting)
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more rows, and end when all that wait are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end; tell whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    # -- in the thread of the engine ------------------------------------------------------------------------------

    def _run(self) -> None:
        while rows := self._next():
            self._answer(rows)
            self.load.running = 0

    def _next(self) -> list[ServedRow]:
        """Wait for rows, and choose those to answer now; none after `close`, when nothing waits."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    return []
                if len(self._waiting) < self.batch_size and not self._closed:
                    until = time.monotonic() + GATHER_SECONDS
                    while len(self._waiting) < self.batch_size and (left := until - time.monotonic()) > 0:
                        self._changed.wait(left)
                self._drop_left()
                if self._waiting:
                    break
            rows = self.chooser.choose(list(self._waiting), self.batch_size)
            chosen = set(map(id, rows))
            self._waiting = deque(row for row in self._waiting if id(row) not in chosen)
            self.load.waiting, self.load.running = len(self._waiting), len(rows)
            return rows

    def _drop_left(self) -> None:
        """Forget rows whose client has gone, or whose time is over."""
        for row in list(self._waiting):
            if (reason := row.reason_to_leave()) is not None:
                self._waiting.remove(row)
                row.fail(reason)
        self.load.waiting = len(self._waiting)

    def _answer(self, rows: Sequence[ServedRow]) -> None:
        """Answer rows together or, where memory does not suffice, in halves. No error ends the thread."""
        try:
            self._generate(rows)
        except Exception as error:
            problem = error
        else:
            self.load.batches += 1
            self.load.rows += len(rows)
            self.load.largest = max(self.load.largest, len(rows))
            return
        rows = [row for row in rows if not row.is_over]
        if is_out_of_memory(problem) and len(rows) > 1 and not any(row.has_begun for row in rows):
            del problem  # its traceback holds tensors
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            half = (len(rows) + 1) // 2
            self._answer(rows[:half])
            self._answer(rows[half:])
            return
        self.tell(f"an answer failed: {type(problem).__name__}: {first_line(problem)}")
        for row in rows:
            row.fail("error")

    @torch.inference_mode()
    def _generate(self, rows: Sequence[ServedRow]) -> None:
        for row in rows:
            row.begin(self.plan, self._stop_ids)
        ids, mask = pad_left([row.ids for row in rows], self.plan.processor.tokenizer.pad_token_id)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self.media.arguments(rows)}
        self.model.generate(
            **inputs,
            **self.plan.keywords | {"max_new_tokens": max(row.room for row in rows)},
            prompt_cache=self._cache,
            logits_processor=LogitsProcessorList([_Choose(rows)]),
            stopping_criteria=StoppingCriteriaList([_Tell(rows)]),
        )
        for row in rows:
            row.fail("length")  # those that the model stopped by itself; the others are over


class _Choose(LogitsProcessor):
    """Lets each row choose its next token in its own way."""

    def __init__(self, rows: Sequence[ServedRow]) -> None:
        self.rows = rows
        self.is_needed = any(row.sampler.changes_logits or row.sampling.num_chances is not None for row in rows)
        self.may_wait = not self.is_needed  # a sampler counts the tokens that its row took

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float[B, V] -> float[B, V], the largest of each row at its next token."""
        if not self.is_needed:
            return scores
        pairs = zip(self.rows, scores, strict=True)
        return torch.stack([x.float() if row.is_over else row.sampler.scores(x).float() for row, x in pairs])


class _Tell(StoppingCriteria):
    """Gives each row its new token, and ends the rows that are over."""

    may_wait = True

    def __init__(self, rows: Sequence[ServedRow]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """int[B, L] so far -> bool[B], true where a row ends here."""
        newest = input_ids[:, -1].tolist()
        ends = [row.is_over or row.take(token) for row, token in zip(self.rows, newest, strict=True)]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)
