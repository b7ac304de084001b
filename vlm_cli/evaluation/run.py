"""Put items to a model, and mark the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from vlm_cli.errors import DataError
from vlm_cli.evaluation.answers import GradedAnswer, make_sample
from vlm_cli.evaluation.items import Item, ItemKey
from vlm_cli.evaluation.metrics import METRICS, Metric
from vlm_cli.evaluation.metrics.choice import ChoiceLikelihood, candidates
from vlm_cli.evaluation.metrics.exact import Exact
from vlm_cli.evaluation.scores import Marks, Score
from vlm_cli.generation.answers import Counts, RowAnswerer
from vlm_cli.generation.likelihood import LikelihoodScorer
from vlm_cli.media import MediaLoader

__all__ = ["Evaluation", "answer_items", "describe_failed", "evaluate_items", "sort_items"]

MOST_DETAILS = 10  # items without an answer that a message names


@dataclass(frozen=True)
class Evaluation:
    """Answers, scores, and what they cost.

    Attributes:
        answers: in the order of the items.
        failed: items without an answer, whose pictures cannot be read, for instance; no score counts them.
        metrics: by which the answers are marked, the main one first.
        marks: what the metrics counted.
        kinds: the score of each kind.
        total: the score of all items.
        counts: what the engine did.
        seconds: of all answers.
    """

    answers: list[GradedAnswer]
    failed: list[Item]
    metrics: Sequence[Metric]
    marks: Marks
    kinds: dict[str | None, Score]
    total: Score
    counts: Counts
    seconds: float

    def in_order(self) -> list[GradedAnswer | Item]:
        """Return the answers, and the items without an answer, in the order of their lines."""
        both: list[GradedAnswer | Item] = [*self.answers, *self.failed]
        return sorted(both, key=lambda x: x.line if isinstance(x, Item) else x.item.line)

    @property
    def num_cut(self) -> int:
        """Answers that reached their greatest length before a stop token."""
        return sum(not answer.has_ended for answer in self.answers)


def evaluate_items(
    answerer: RowAnswerer,
    items: Sequence[Item],
    loader: MediaLoader,
    metrics: Sequence[Metric] = (METRICS[Exact.name],),
    *,
    name: str = "the records",
    report: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Answer items, and mark the answers.

    Args:
        answerer: the engine, also of `vlm batch`.
        items: encoded, with room reserved.
        loader: finds images.
        metrics: by which the answers are marked, the main one first.
        name: of the file of the items, for messages.
        report: receives the number of items that are done.

    Raises:
        DataError: if no item can be answered.
    """
    started = time.monotonic()
    rated = _rate_choices(answerer, items, loader) if any(x.needs_likelihoods for x in metrics) else {}
    if any(x.needs_answers for x in metrics):
        answers = answer_items(answerer, items, loader, name=name, report=report)
        answers = [replace(x, likelihoods=rated.get(x.item.key, ())) for x in answers]
    else:
        answers = [_best_choice(item, rated[item.key], metrics[0]) for item in items if item.error is None]
        report(len(items))
        _check_answered(answers, items, name)
    failed = [item for item in items if item.error is not None]
    seconds = time.monotonic() - started
    samples = [make_sample(x.item, x.text, x.likelihoods) for x in answers]
    marks = Marks(samples, [x.item.kind for x in answers], metrics)
    graded = [replace(x, marks=own) for x, own in zip(answers, marks.of_items(), strict=True)]
    return Evaluation(graded, failed, metrics, marks, marks.by_kind(), marks.total(), answerer.counts, seconds)


def answer_items(
    answerer: RowAnswerer,
    items: Sequence[Item],
    loader: MediaLoader,
    *,
    name: str = "the records",
    report: Callable[[int], None] = lambda done: None,
) -> list[GradedAnswer]:
    """Return the answers, in the order of the items; arguments and errors are those of `evaluate_items`.

    An item that cannot be answered gets an `error`, and takes no other item's answer with it.
    """
    rows: Iterator[Item] = iter(sort_items(items))
    with closing(answerer.answer(rows, loader)) as answered:
        for done, _ in enumerate(answered, start=1):
            report(done)
    answers = [_grade(item) for item in items if item.error is None]
    _check_answered(answers, items, name)
    return answers


def _check_answered(answers: Sequence[GradedAnswer], items: Sequence[Item], name: str) -> None:
    if not answers:
        raise DataError(describe_failed(items, len(items), name))


def _rate_choices(
    answerer: RowAnswerer, items: Sequence[Item], loader: MediaLoader
) -> dict[ItemKey, tuple[tuple[float, int], ...]]:
    """Return the log-probability and the number of tokens of each choice, for each item that can be asked."""
    scorer = LikelihoodScorer(answerer.plan, answerer.size, answerer.picture_notes)
    asked = [item for item in items if item.error is None]
    texts = [[_as_expected(x, item) for x in candidates(make_sample(item))] for item in asked]
    found = scorer.score(asked, texts, loader)
    return {x.key: tuple((y.log_probability, y.num_tokens) for y in of) for x, of in zip(asked, found, strict=True)}


def _as_expected(choice: str, item: Item) -> str:
    """Write a choice with the space that the completion of the record begins with."""
    start = item.expected[: len(item.expected) - len(item.expected.lstrip())]
    return start + choice.strip()


def _best_choice(item: Item, rated: tuple[tuple[float, int], ...], metric: Metric) -> GradedAnswer:
    """Return the likeliest choice as the answer."""
    assert isinstance(metric, ChoiceLikelihood)
    return GradedAnswer(item, candidates(make_sample(item))[metric.best(rated)], True, rated)


def describe_failed(failed: Sequence[Item], total: int, name: str) -> str:
    """Say which items have no answer, and why; one line for each of the first few.

    Args:
        failed: the items, each with its error.
        total: number of all items.
        name: of the file of the items.
    """
    lines = [f"  {item.record.unit} {item.line} of {name!r}: {item.error}" for item in failed[:MOST_DETAILS]]
    more = [f"  and {len(failed) - MOST_DETAILS:,} more"] if len(failed) > MOST_DETAILS else []
    return "\n".join([f"{len(failed):,} of {total:,} items have no answer, and are not counted:", *lines, *more])


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
