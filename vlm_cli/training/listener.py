"""How a run tells the world how it goes. Imports no torch, so that the command line can define a listener at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_cli.training.outcome import StepReport

__all__ = ["Listener"]


class Listener:
    """Hears how a run goes. This class does nothing; a subclass shows what it hears."""

    def step(self, name: str) -> None:
        """Hear that a part of the preparation begins; with the empty text, that the last part has ended."""

    def notify(self, message: str) -> None:
        """Hear a message for the user."""

    def progress(self, report: StepReport) -> None:
        """Hear how far the run has come."""

    def step_done(self, step: int, total: int | None, seconds_left: float) -> None:
        """Hear that a step is done; with step 0, that the first begins.

        Args:
            step: number of steps that are done.
            total: of the run; None if only minutes limit it.
            seconds_left: until the end of the run.
        """
