"""The answers of a model to held-out questions while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Examination", "ExaminedAnswer", "Question"]


@dataclass(frozen=True)
class Question:
    """What is asked at each checkpoint.

    Attributes:
        id: of the record.
        prompt: in the grammar of `vlm generate`.
        expected: the right answer.
        pictures: small pictures as `data:` URIs, in reading order; empty where a page has no room for them.
    """

    id: str
    prompt: str
    expected: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExaminedAnswer:
    """What a model answered to a question, and whether that is right."""

    id: str
    answer: str
    exact: bool


@dataclass(frozen=True)
class Examination:
    """The answers at one step.

    Attributes:
        answers: in the order of the questions.
        step: steps of training that were done.
    """

    answers: Sequence[ExaminedAnswer] = field(default_factory=list)
    step: int = 0

    @property
    def exact(self) -> int:
        """The number of right answers."""
        return sum(answer.exact for answer in self.answers)

    @property
    def share(self) -> float:
        """The share of right answers, 0 to 1."""
        return self.exact / len(self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Return a line of the file of answers."""
        return {"step": self.step, "exact": self.exact, "answers": [asdict(answer) for answer in self.answers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Examination:
        """Read a line of the file of answers.

        Raises:
            KeyError, TypeError: if it is none.
        """
        return cls([ExaminedAnswer(**answer) for answer in data["answers"]], int(data["step"]))
