"""What a sweep has found: a row for each composition, with its scores and how they differ from those of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vlm_cli.evaluation.comparison import Difference
from vlm_cli.evaluation.metrics import Metric
from vlm_cli.evaluation.scores import Score
from vlm_cli.sweeps.candidates import Candidate
from vlm_cli.sweeps.overview import Overview
from vlm_cli.sweeps.runs import Run
from vlm_cli.sweeps.scoring import Answered, difference_of, read_answers, score_of

if TYPE_CHECKING:
    from vlm_cli.evaluation.items import Item

__all__ = ["Results", "Row", "SeedResult", "collect"]


@dataclass(frozen=True)
class SeedResult:
    """One run of a composition.

    Attributes:
        run: the run.
        training: steps, seconds and loss; empty before it is trained.
        score: None before its questions are answered.
        problem: why it failed.
    """

    run: Run
    training: Mapping[str, Any] = field(default_factory=dict)
    score: Score | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of the run."""
        return {
            "seed": self.run.seed,
            "directory": self.run.folder.name,
            **self.training,
            **({} if self.score is None else self.score.to_dict()),
            **({} if self.problem is None else {"problem": self.problem}),
        }


@dataclass(frozen=True)
class Row:
    """A composition.

    Attributes:
        overview: what it is and costs.
        seeds: its runs; empty if it is impossible, or the same as another one.
        score: of all seeds together; None before one is complete.
        differences: from the base, for each figure; empty for the base itself.
        is_base: whether others are compared with it.
    """

    overview: Overview
    seeds: Sequence[SeedResult] = ()
    score: Score | None = None
    differences: Sequence[Difference] = ()
    is_base: bool = False

    @property
    def candidate(self) -> Candidate:
        return self.overview.candidate

    def mean_of(self, name: str) -> float | None:
        """Return the mean over the seeds of a number of the training; None if none has it."""
        found = [x.training[name] for x in self.seeds if x.training.get(name) is not None]
        return fmean(found) if found else None

    @property
    def training_flops(self) -> float | None:
        """Operations of the training of one seed, on average; padding aside."""
        steps, flops = self.mean_of("steps"), self.overview.flops_per_record
        return None if steps is None or flops is None else steps * self.candidate.settings.step_size(1) * flops

    def to_dict(self) -> dict[str, Any]:
        """Return everything that is known of the composition."""
        flops = self.training_flops
        return {
            **self.overview.to_dict(),
            **({} if flops is None else {"training_flops": round(flops)}),
            "is_base": self.is_base,
            **({} if self.score is None else self.score.to_dict()),
            "against_base": [x.to_dict() for x in self.differences],
            "runs": [x.to_dict() for x in self.seeds],
        }


@dataclass(frozen=True)
class Results:
    """The table of a sweep.

    Attributes:
        rows: in the order of the grid.
        metrics: by which answers are marked.
        facts: names and values: data, budget, versions.
    """

    rows: Sequence[Row]
    metrics: Sequence[Metric]
    facts: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; shares are from 0 to 1."""
        rules = {x.name: {"rule": x.summary, "source": x.source} for x in self.metrics}
        return {**self.facts, "metrics": rules, "compositions": [row.to_dict() for row in self.rows]}


def collect(
    overviews: Sequence[Overview],
    runs: Sequence[Run],
    problems: Mapping[str, str],
    items: Sequence[Item],
    metrics: Sequence[Metric],
    reference: Candidate | None,
) -> list[Row]:
    """Read what the runs have written so far, and compare.

    Args:
        overviews: of all compositions.
        runs: of those that are possible.
        problems: folder of a run that failed -> why.
        items: the questions.
        metrics: by which their answers are marked.
        reference: the composition with which the others are compared.

    Raises:
        DataError: if a file of answers does not hold these questions.
    """
    answered: dict[int, dict[int, Answered]] = {}
    seeds: dict[int, list[SeedResult]] = {}
    for run in runs:
        number, score = run.candidate.number, None
        if run.is_complete:
            found = read_answers(run.answers, items, metrics)
            answered.setdefault(number, {})[run.seed] = found
            score = score_of([found], metrics)
        result = SeedResult(run, run.read_training(), score, problems.get(run.folder.name))
        seeds.setdefault(number, []).append(result)
    base = answered.get(reference.number, {}) if reference is not None else {}
    rows = []
    for overview in overviews:
        number = overview.candidate.number
        own = answered.get(number, {})
        is_base = reference is not None and number == reference.number
        rows.append(
            Row(
                overview,
                seeds.get(number, []),
                score_of(list(own.values()), metrics) if own else None,
                difference_of(base, own, metrics) if base and own and not is_base else [],
                is_base,
            )
        )
    return rows
