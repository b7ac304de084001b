"""What `vlm train` shows while a run goes on, and what it prints of it at the end."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_cli.cli import console
from vlm_cli.cli.progress import format_duration
from vlm_cli.cli.terminal import is_terminal, overwrite_line
from vlm_cli.printable import count_of
from vlm_cli.training.listener import Listener

if TYPE_CHECKING:
    from vlm_cli.report.examination import Examination
    from vlm_cli.training.outcome import StepReport, TrainingResult

__all__ = ["TrainingLog", "print_results"]

MOST_ANSWERS = 3  # that the log shows at each checkpoint


class TrainingLog(Listener):
    """Shows a run on stderr: messages and losses on lines that stay, and the last step on one that it overwrites."""

    def __init__(self) -> None:
        self.last = ""  # what the last report says of the loss and the speed
        self.shown = False  # whether the cursor stands behind the progress line
        self.running_step = contextlib.ExitStack()  # the part of the preparation that began last

    def step(self, name: str) -> None:
        self.leave_line()
        self.running_step.close()
        if name:
            self.running_step.enter_context(console.announced_steps(console.is_quiet()))(name)

    def notify(self, message: str) -> None:
        self.leave_line()
        console.note(message)

    def progress(self, report: StepReport) -> None:
        self.notify(_format_report(report))
        for line in _format_answers(report.examination):
            self.notify(line)
        if report.loss is not None:
            self.last = f"  loss {report.loss:.4f}  {_format_speed(report)}"

    def step_done(self, step: int, total: int | None, seconds_left: float) -> None:
        """Show the number of the step until the next message; only a terminal can take the line back."""
        if is_terminal(sys.stderr) and not console.is_quiet():
            left = f", {_format_left(seconds_left)} left" if math.isfinite(seconds_left) else ""
            of = "" if total is None else f"/{total}"
            overwrite_line(f"  step {step}{of} done{self.last}{left}" if step else "  the first step …")
            self.shown = True

    def leave_line(self) -> None:
        """Take the progress line back, so that the next message stands in its place."""
        if self.shown:
            overwrite_line("", end="\r")
            self.shown = False


def _format_report(report: StepReport) -> str:
    """Write a report as one line.

    >>> from vlm_cli.training.outcome import StepReport
    >>> _format_report(StepReport(20, 100, 1.5, None, 41.0, 95.0, 0.4, 9.5e-05, 1.25))
    'step 20/100  loss 1.5000  epoch 0.4  lr 9.5e-05  grad 1.2  41 images/s  1:35 left'
    """
    total = "" if report.total_steps is None else f"/{report.total_steps}"
    if report.loss is None:
        found = report.examination
        right = "" if found is None else f"  {found.exact:,} of {count_of(len(found.answers), 'answer')} right"
        return f"step {report.step}{total}  eval loss {report.eval_loss:.4f}{right}"
    numbers = (("epoch", report.epoch, ".3g"), ("lr", report.learning_rate, ".2g"), ("grad", report.grad_norm, ".2g"))
    known = [f"{name} {value:{how}}" for name, value, how in numbers if value is not None]
    words = [f"step {report.step}{total}", f"loss {report.loss:.4f}", *known, _format_speed(report)]
    return "  ".join([*words, f"{_format_left(report.seconds_left)} left"])


def _format_speed(report: StepReport) -> str:
    speed = f"{report.images_per_second:.{0 if report.images_per_second >= 10 else 1}f} images/s"
    return speed if report.tokens_per_second is None else f"{speed}  {report.tokens_per_second:,.0f} tokens/s"


def _format_answers(found: Examination | None) -> list[str]:
    """Write the first answers to held-out questions, one line each.

    >>> from vlm_cli.report.examination import Examination, ExaminedAnswer
    >>> _format_answers(Examination([ExaminedAnswer("a", " a cat", False), ExaminedAnswer("b", " two", True)]))
    ["  wrong  a: 'a cat'", "  right  b: 'two'"]
    """
    return [
        f"  {'right' if x.exact else 'wrong'}  {x.id}: {x.answer.strip()[:100]!r}"
        for x in ([] if found is None else found.answers[:MOST_ANSWERS])
    ]


def _format_left(seconds: float) -> str:
    """Write a duration in few characters.

    >>> _format_left(95), _format_left(3725)
    ('1:35', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_results(results: Sequence[TrainingResult]) -> None:
    """Print a row for the run, or for each of its stages."""

    def format_loss(x: float | None) -> str:
        return "-" if x is None else f"{x:.4f}"

    heads = ("Steps", "Records", "Images", "Loss", "Eval loss", "Images/s", "Time")
    rows = [
        (
            f"{result.steps:,}",
            f"{result.records:,}",
            f"{result.images:,}",
            format_loss(result.loss),
            format_loss(result.eval_loss),
            f"{result.images_per_second:.1f}",
            format_duration(result.seconds),
        )
        for result in results
    ]
    console.print_table(heads, rows)
