"""`Metric`: how answers are marked, and how the marks of many items become a few numbers.

n items, k statistics of an item, f figures of a metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Figure", "Metric", "PerItemMetric", "Sample"]


@dataclass(frozen=True)
class Sample:
    """An answer, and what a metric may know of its question.

    Attributes:
        answer: what the model wrote; empty while a metric is chosen.
        expected: the completion of the record.
        accepted: every right answer; one that several people gave stands there several times. At least one.
        choices: among which the question lets one choose.
        group: the questions that count as one, such as those about one picture.
        likelihoods: for each choice its log-probability and its number of tokens, where a metric asks for them.
        place: where the record stands, for messages.
    """

    answer: str
    expected: str
    accepted: tuple[str, ...]
    choices: tuple[str, ...] = ()
    group: str = ""
    likelihoods: tuple[tuple[float, int], ...] = ()
    place: str = ""

    @property
    def cluster(self) -> str:
        """What tells the samples that depend on each other: one group, or the turns of one conversation."""
        return self.group or self.place


@dataclass(frozen=True)
class Figure:
    """A number of a metric.

    Attributes:
        name: of the number; the first of a metric has the metric's name.
        is_share: whether it lies between 0 and 1, and is shown as a percentage.
    """

    name: str
    is_share: bool = True


class Metric(ABC):
    """A way to mark answers.

    The marks of an item are k statistics. A figure of a set of items is a function of the sums of their statistics, so
    that a bootstrap adds up the statistics of the items that it draws.

    Attributes:
        name: for `--metric`.
        summary: the rule, in one sentence, for the table's reader.
        source: who published it.
        figures: the numbers it gives, the main one first.
        is_binary: whether an item is either right or wrong.
        needs_answers: whether the model must write an answer.
        needs_likelihoods: whether the model must rate the choices.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]
    is_binary: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = True
    needs_likelihoods: ClassVar[bool] = False

    def find_problem(self, samples: Sequence[Sample]) -> str | None:
        """Say why the metric does not fit the questions, as a sentence; None if it fits."""
        return None

    @abstractmethod
    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the statistics of each item, float[n, k]."""

    @abstractmethod
    def values(self, sums: np.ndarray) -> np.ndarray:
        """Return the figures of sets of items, float[..., f], from the sums of their statistics, float[..., k]."""

    def counts(self, sums: np.ndarray) -> np.ndarray:
        """Return of how many cases each figure is the share, float[f], from the sums of all items, float[k].

        The first statistic of an item is 1 where a metric has shares of items.
        """
        import numpy as np

        return np.full(len(self.figures), sums[0])


class PerItemMetric(Metric):
    """A metric that marks each item alone; its figure is the mean of the marks."""

    @abstractmethod
    def score(self, sample: Sample) -> float:
        """Return the mark of an item."""

    def measure(self, samples: Sequence[Sample]) -> np.ndarray:
        import numpy as np

        return np.array([[1.0, self.score(sample)] for sample in samples], dtype=np.float64).reshape(-1, 2)

    def values(self, sums: np.ndarray) -> np.ndarray:
        return divide(sums[..., 1:], sums[..., :1])


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide; nothing by nothing is 0, as where precision has no answer yes to count."""
    import numpy as np

    return np.divide(above, below, out=np.zeros(np.broadcast_shapes(above.shape, below.shape)), where=below != 0)
