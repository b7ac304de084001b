"""What a run shows of itself while it goes on: answers to held-out questions, and a page that grows.

    OUT.checkpoints/answers.jsonl    a line for each checkpoint: the answers to every question
    OUT.checkpoints/run.html         curves, and some of these answers with their pictures

Both are copied into OUT at the end. `Examiner` is what this package knows of evaluations, which are made above it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from vlm_cli.errors import CheckpointError, VLMError
from vlm_cli.files import replacing_file
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import parse_json
from vlm_cli.processor import VLMProcessor
from vlm_cli.report.examination import Examination, Question
from vlm_cli.report.run_page import format_run_page
from vlm_cli.training.best import BestWeights
from vlm_cli.training.job import Job
from vlm_cli.writing.writer import PromptWriter

__all__ = [
    "ANSWERS_FILE",
    "PAGE_FILE",
    "Examiner",
    "MakeExaminer",
    "RunPage",
    "Watching",
    "make_no_examiner",
    "preserved_randomness",
]

ANSWERS_FILE, PAGE_FILE = "answers.jsonl", "run.html"
PAGE_SECONDS = 5.0  # between two pages, at least; one that takes long to write waits for longer
PAGE_SHARE = 0.01  # of the run's time that the page may take


class Examiner(Protocol):
    """Asks a model held-out questions."""

    def begin(self, model: VLM, processor: VLMProcessor, writer: PromptWriter) -> Sequence[Question]:
        """Read and check the questions, and return those that a page shows.

        Raises:
            VLMError: if there is none, or the model has no room for one.
        """

    def examine(self) -> Examination:
        """Put the questions to the model as it is now; its step is 0."""


#: Makes what asks the held-out questions of a job; None asks none.
MakeExaminer: TypeAlias = Callable[[Job], Examiner | None]


def make_no_examiner(job: Job) -> None:
    """Ask no questions."""


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore every state of random numbers after the block, so that the block does not change what is learned."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class RunPage:
    """Writes the page and the answers of a run into the folder of its checkpoints.

    Args:
        folder: of the checkpoints.
        title: of the page.
        facts: names and values that stay the same.
        notify: is told once if the page cannot be written.
    """

    def __init__(self, folder: Path, title: str, facts: Mapping[str, str], notify: Callable[[str], None]) -> None:
        self.path, self.answers = folder / PAGE_FILE, folder / ANSWERS_FILE
        self.title, self.facts, self.notify = title, dict(facts), notify
        self.questions: Sequence[Question] = ()
        self.examinations: list[Examination] = []
        self._written, self._cost, self._is_broken = 0.0, 0.0, False

    def restore(self, step: int) -> None:
        """Read the answers of the steps up to a checkpoint, and forget later ones; step 0 begins anew."""
        try:
            lines = self.answers.read_text(encoding="utf-8").splitlines() if step else []
            found = [Examination.from_dict(parse_json(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError):  # it is for reading alone: a damaged one costs old answers
            found = []
        self.examinations = [x for x in found if x.step <= step]
        if self.examinations or self.answers.exists():
            text = "".join(json.dumps(x.to_dict()) + "\n" for x in self.examinations)
            self.answers.write_text(text, encoding="utf-8")

    def add(self, examination: Examination) -> None:
        """Keep the answers of a step.

        Raises:
            CheckpointError: if the file of answers cannot be written.
        """
        self.examinations.append(examination)
        try:
            with self.answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps(examination.to_dict()) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.answers)!r}: {error.strerror}.") from None

    def update(
        self,
        entries: Sequence[Mapping[str, Any]],
        facts: Mapping[str, str],
        progress: float | None,
        *,
        is_due: bool = False,
    ) -> None:
        """Write the page anew, whole or not at all, unless that was done a moment ago.

        Args:
            entries: all measurements so far.
            facts: names and values of this moment.
            progress: share of the run that is done; None at its end.
            is_due: write it in any case.
        """
        started = time.monotonic()
        if self._is_broken or not (is_due or started > self._written + max(PAGE_SECONDS, self._cost / PAGE_SHARE)):
            return
        page = format_run_page(
            self.title, self.facts | dict(facts), entries, self.questions, self.examinations, progress=progress
        )
        try:
            with replacing_file(self.path, overwrite=True) as file:
                file.write(page)
        except VLMError as error:  # the run itself is worth more than its page
            self._is_broken = True
            self.notify(f"Note: {error} The run goes on without its page.")
        self._written, self._cost = time.monotonic(), time.monotonic() - started


@dataclass
class Watching:
    """What is measured and shown while a model trains, beside its losses.

    Attributes:
        page: that grows with the run; None in all but the main process.
        examiner: asks held-out questions at each checkpoint; None asks none.
        best: keeps the best weights; None keeps the last.
        last: the last answers to these questions.
    """

    page: RunPage | None = None
    examiner: Examiner | None = None
    best: BestWeights | None = None
    last: Examination | None = None

    def begin(self, model: VLM, processor: VLMProcessor, writer: PromptWriter) -> None:
        """Read and check the held-out questions.

        Raises:
            VLMError: if one cannot be asked.
        """
        if self.examiner is not None:
            questions = self.examiner.begin(model, processor, writer)
            if self.page is not None:
                self.page.questions = questions

    def restore(self, checkpoint: Path, step: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Go back to the state of a checkpoint, whose weights may be the best."""
        if self.page is not None:
            self.page.restore(step)
            self.keep_best(checkpoint, step, entries)

    def examine(self, step: int) -> None:
        """Ask the questions at a step, and keep the answers."""
        assert self.examiner is not None
        self.last = replace(self.examiner.examine(), step=step)
        if self.page is not None:
            self.page.add(self.last)

    def last_scores(self) -> dict[str, float]:
        """Return what the log says of the last answers: the share that is right, and their number."""
        return {} if self.last is None else {"exact": self.last.share, "examined": len(self.last.answers)}

    def keep_best(self, checkpoint: Path, step: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep the weights of a complete checkpoint if they are the best so far."""
        if self.best is not None:
            self.best.keep(checkpoint, step, entries)

    def update(
        self,
        entries: Sequence[Mapping[str, Any]],
        facts: Mapping[str, str],
        progress: float | None,
        *,
        is_due: bool = False,
    ) -> None:
        """Bring the page up to date; see `RunPage.update`."""
        if self.page is not None:
            self.page.update(entries, facts, progress, is_due=is_due)
