"""Put items to a model, and count the right answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from vlm_cli.errors import DataError
from vlm_cli.evaluation.items import GradedAnswer, Item
from vlm_cli.evaluation.scores import Score, score
from vlm_cli.generation.answers import Counts, RowAnswerer
from vlm_cli.media import MediaLoader

__all__ = ["Evaluation", "answer_items", "evaluate_items", "sort_items"]


@dataclass(frozen=True)
class Evaluation:
    """Answers, scores, and what they cost.

    Attributes:
        answers: in the order of the items.
        kinds: the score of each kind.
        total: the score of all items.
        counts: what the engine did.
        seconds: of all answers.
    """

    answers: list[GradedAnswer]
    kinds: dict[str | None, Score]
    total: Score
    counts: Counts
    seconds: float

    @property
    def num_cut(self) -> int:
        """Answers that reached their greatest length before a stop token."""
        return sum(not answer.has_ended for answer in self.answers)


def evaluate_items(
    answerer: RowAnswerer,
    items: Sequence[Item],
    loader: MediaLoader,
    *,
    name: str = "the records",
    report: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Answer items, and count the right answers.

    Args:
        answerer: the engine, also of `vlm batch`.
        items: encoded, with room reserved.
        loader: finds images.
        name: of the file of the items, for messages.
        report: receives the number of items that are done.

    Raises:
        DataError: if an image cannot be decoded, or memory does not suffice for one item alone.
    """
    started = time.monotonic()
    answers = answer_items(answerer, items, loader, name=name, report=report)
    kinds, total = score((answer.item.kind, answer.exact) for answer in answers)
    return Evaluation(answers, kinds, total, answerer.counts, time.monotonic() - started)


def answer_items(
    answerer: RowAnswerer,
    items: Sequence[Item],
    loader: MediaLoader,
    *,
    name: str = "the records",
    report: Callable[[int], None] = lambda done: None,
) -> list[GradedAnswer]:
    """Return the answer to each item, in the order of the items; arguments and errors are those of `evaluate_items`."""
    rows: Iterator[Item] = iter(sort_items(items))
    with closing(answerer.answer(rows, loader)) as answered:
        for done, item in enumerate(answered, start=1):
            if item.error is not None:
                raise DataError(f"line {item.line} of {name!r}: {item.error}")
            report(done)
    return [_grade(item) for item in items]


def sort_items(items: Sequence[Item]) -> list[Item]:
    """Put similar items next to each other, so that they share a batch: number of images, kind, length.

    A batch takes as long as its longest answer, and answers of one kind are of similar length. Items with the most
    images come first: if memory does not suffice for them, that shows at once.
    """
    return sorted(items, key=lambda item: (len(item.media), item.kind or "", len(item.ids)), reverse=True)


def _grade(item: Item) -> GradedAnswer:
    assert item.answers is not None
    [answer] = item.answers
    return GradedAnswer(item, answer.text, answer.finish_reason == "stop_token")
