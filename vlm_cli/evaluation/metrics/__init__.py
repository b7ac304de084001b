"""Metrics of answers, by name, and which one fits some questions."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_cli.errors import DataError, UnknownNameError, UsageError
from vlm_cli.evaluation.metrics.anls import ANLS
from vlm_cli.evaluation.metrics.captions import BLEU, CIDEr, Rouge
from vlm_cli.evaluation.metrics.choice import ChoiceLikelihood, MeanChoiceLikelihood, MultipleChoice
from vlm_cli.evaluation.metrics.exact import Exact, Normalised
from vlm_cli.evaluation.metrics.metric import Figure, Metric, Sample
from vlm_cli.evaluation.metrics.relaxed import Relaxed
from vlm_cli.evaluation.metrics.vqa import VQA
from vlm_cli.evaluation.metrics.yes_no import MME, YesNo
from vlm_cli.registry import suggest

__all__ = ["METRICS", "Figure", "Metric", "Sample", "check_metrics", "find_default", "parse_metrics"]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Exact(),
        Normalised(),
        VQA(),
        ANLS(),
        Relaxed(),
        MultipleChoice(),
        ChoiceLikelihood(),
        MeanChoiceLikelihood(),
        YesNo(),
        MME(),
        CIDEr(),
        BLEU(),
        Rouge(),
    )
}
_PEOPLE = 10  # answers of an item from which on they are taken for those of as many people


def parse_metrics(text: str) -> list[Metric]:
    """Read `--metric`: names with commas between them.

    Raises:
        UnknownNameError: if there is no metric of a name.
        UsageError: if a name stands there twice.
    """
    names = [x.strip().lower() for x in text.split(",")]
    for name in names:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise UnknownNameError(f"unknown metric {name!r}.{suggest(name, METRICS)} Known: {known}.")
        if names.count(name) > 1:
            raise UsageError(f"--metric names {name!r} twice. Give it once.")
    return [METRICS[name] for name in names]


def find_default(samples: Sequence[Sample], published: Sequence[str | None] = ()) -> tuple[Metric, str]:
    """Return the metric by which questions are marked unless the user names one, and the reason in words.

    Args:
        samples: the questions, without answers.
        published: the metric of each question's benchmark; None for none.

    Raises:
        UsageError: if benchmarks are mixed whose metrics differ.
    """
    if names := sorted({x for x in published if x is not None}):
        if len(names) > 1 or None in published:
            raise UsageError(
                f"the records are of benchmarks that are marked differently, by {', '.join(names)}"
                f"{' and others' if None in published else ''}. Name one metric for all: --metric {names[0]}"
            )
        return METRICS[names[0]], "as this benchmark is marked"
    if all(x.choices for x in samples):
        return METRICS[MultipleChoice.name], "since each item has choices"
    if all(len(x.accepted) >= _PEOPLE for x in samples):
        return METRICS[VQA.name], f"since each item has {_PEOPLE} answers or more"
    return METRICS[Exact.name], "the default; --metric NAME takes another"


def check_metrics(metrics: Sequence[Metric], samples: Sequence[Sample]) -> None:
    """Check that metrics fit the questions.

    Raises:
        DataError: naming the first that does not, and why.
    """
    for metric in metrics:
        if problem := metric.find_problem(samples):
            raise DataError(f"the metric {metric.name} does not fit these records: {problem}")
