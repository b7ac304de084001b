"""What `vlm eval` prints and writes: tables, JSON, the file of answers and the page."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vlm_cli.cli import console
from vlm_cli.cli.eval_options import OutputOptions, QuestionOptions
from vlm_cli.errors import DataError
from vlm_cli.evaluation.comparison import Difference, compare
from vlm_cli.evaluation.figures import difference_cells, estimate_cells, name_kind

if TYPE_CHECKING:
    from vlm_cli.data.records import Records
    from vlm_cli.evaluation.metrics import Metric
    from vlm_cli.evaluation.run import Evaluation
    from vlm_cli.evaluation.scores import Score

__all__ = ["ModelRun", "Report"]


@dataclass(frozen=True)
class ModelRun:
    """A model, and what it answered.

    Attributes:
        name: what the user typed.
        device: that it ran on.
        dtype: of its weights.
        found: its answers and scores.
    """

    name: str
    device: str
    dtype: str
    found: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return the facts and the scores, with shares from 0 to 1, and seconds."""
        found = self.found
        return {
            "model": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": round(found.seconds, 3),
            "items_per_second": round(len(found.answers) / found.seconds, 1),
            "cut": found.num_cut,
            "total": found.total.to_dict(),
            "kinds": [{"kind": kind, **score.to_dict()} for kind, score in found.kinds.items()],
            "answers": [answer.to_dict() for answer in found.answers],
            **({"failed": [item.to_dict() for item in found.failed]} if found.failed else {}),
        }


@dataclass(frozen=True)
class Report:
    """The evaluations of one or several models, and what a reader must know to judge them."""

    runs: Sequence[ModelRun]
    questions: QuestionOptions
    control: str | None
    records: Records
    metrics: Sequence[Metric]

    @cached_property
    def differences(self) -> list[list[Difference]]:
        """Each model but the first against the first.

        Raises:
            DataError: if they have no item in common.
        """
        first, *others = self.runs
        return [compare(first.found, other.found) for other in others]

    def print(self, as_json: bool, *, to_stderr: bool = False) -> None:
        """Print the scores on stdout: tables, or everything as JSON.

        Args:
            as_json: print JSON.
            to_stderr: print one line for each kind on stderr, since stdout holds the answers.
        """
        if as_json:
            console.print_json(self.to_dict())
            return
        for run in self.runs:
            title = " with ".join(x for x in (run.name if len(self.runs) > 1 else "", self.control) if x)
            if to_stderr:
                _tell_scores(run, title)
            else:
                _print_scores(run, title)
        if not to_stderr:
            for run, differences in zip(self.runs[1:], self.differences, strict=True):
                _print_differences(self.runs[0].name, run.name, differences)

    def check_failed(self) -> None:
        """Say, after the scores, which items have no answer.

        Raises:
            DataError: if there are any.
        """
        from vlm_cli.evaluation.run import describe_failed

        told = []
        for run in self.runs:
            failed, answered = run.found.failed, len(run.found.answers)
            if failed:
                words = describe_failed(failed, len(failed) + answered, str(self.questions.data))
                told.append(f"{run.name}: {words}" if len(self.runs) > 1 else words)
        if told:
            raise DataError("\n".join(told))

    def to_dict(self) -> dict[str, Any]:
        """Return everything: the facts of one model, or under "models" and "comparisons" those of several."""
        questions = self.questions
        facts = {
            "data": str(questions.data),
            "data_sha256": self.records.sha256,
            "batch_size": questions.batch_size,
            "max_new_tokens": questions.max_new_tokens,
            "limit": questions.limit,
            **({"columns": questions.columns} if questions.columns else {}),
            "chat_template": questions.chat_template,
            **({} if questions.system is None else {"system": questions.system}),
            "special_tokens": questions.special_tokens,
            **({"max_tiles": questions.max_tiles} if questions.max_tiles else {}),
            **({"control": self.control} if self.control else {}),
            "metrics": {x.name: {"rule": x.summary, "source": x.source} for x in self.metrics},
        }
        if len(self.runs) == 1:
            return {**facts, **self.runs[0].to_dict()}
        return {
            **facts,
            "models": [run.to_dict() for run in self.runs],
            "comparisons": [
                {"first": self.runs[0].name, "second": run.name, "differences": [x.to_dict() for x in found]}
                for run, found in zip(self.runs[1:], self.differences, strict=True)
            ],
        }

    def write(self, files: OutputOptions) -> None:
        """Write the files that the user asked for, all of them or none.

        Raises:
            VLMError: if a file cannot be written.
        """
        from vlm_cli.files import replacing_files

        with replacing_files(files.paths, overwrite=files.overwrite) as opened:
            for path, file in zip(files.paths, opened, strict=True):
                if path == files.output:
                    lines = (json.dumps(x, ensure_ascii=False, allow_nan=False) for x in self._answers())
                    file.writelines(f"{line}\n" for line in lines)
                else:
                    self._write_page(file)
        for path in files.paths:
            console.notify(f"Wrote {path}")
        if files.prints == "--output":
            for answer in self._answers():
                console.print_json(answer, indent=None)
        elif files.prints == "--html":
            page = io.StringIO()
            self._write_page(page)
            console.print_lines(page.getvalue())

    def _answers(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of the file of answers; of several models, with the name of each."""
        for run in self.runs:
            named = {"model": run.name} if len(self.runs) > 1 else {}
            yield from ({**named, **x.to_dict()} for x in run.found.in_order())

    def _write_page(self, file: TextIO) -> None:
        from vlm_cli.evaluation.page import Column, write_page

        names = [run.name if len(self.runs) > 1 else "" for run in self.runs]
        columns = [
            Column(name, run.found.kinds, run.found.total, run.found.answers, differences)
            for name, run, differences in zip(names, self.runs, [[], *self.differences], strict=True)
        ]
        title = f"{' and '.join(Path(run.name).name for run in self.runs)} on {self.questions.data}"
        write_page(file, title, self._facts(), self.metrics, columns, self.records.loader())

    def _facts(self) -> dict[str, str]:
        """Return what the page says of how the answers were made."""
        questions, found = self.questions, [run.found for run in self.runs]
        cut = sum(x.num_cut for x in found)
        places = dict.fromkeys(f"on {run.device} in {run.dtype}" for run in self.runs)
        return {
            "model": ", ".join(run.name for run in self.runs),
            "records": f"{questions.data} (SHA-256 {self.records.sha256[:16]}…)",
            **({"control": self.control} if self.control else {}),
            "answers": f"greedy, at most {questions.max_new_tokens} tokens, {cut:,} cut there",
            "computed": f"{', '.join(places)}, {questions.batch_size} at a time, {sum(x.seconds for x in found):.0f} s",
        }


def _tell_scores(run: ModelRun, title: str) -> None:
    """Say the main figure of each kind on stderr."""
    head = f"{title}: " if title else ""
    for name, score in (*((_kind(x), s) for x, s in run.found.kinds.items()), ("total", run.found.total)):
        figure, value, _ = estimate_cells(score.main)
        console.notify(f"{head}{name}: {figure} {value} of {score.items:,} items")


def _print_scores(run: ModelRun, title: str) -> None:
    """Print the figures of each kind and of all items."""
    rows = []
    if list(run.found.kinds) != [None]:  # or they are the total
        for kind, score in run.found.kinds.items():
            rows += _rows(_kind(kind), score)
    total = _rows("total", run.found.total)
    heads = ["kind", "items", "metric", "score", "95 % interval"]
    console.print_table(heads, [*rows, *total], title=title, total=len(total) == 1)


def _rows(name: str, score: Score) -> list[list[str]]:
    return [[name, f"{score.items:,}", *estimate_cells(x)] for x in score.estimates]


def _print_differences(first: str, second: str, differences: Sequence[Difference]) -> None:
    """Print what the second model is better at."""
    heads = ["metric", "items", "first", "second", "difference", "95 % interval", "p"]
    rows = [[x.figure.name, f"{x.items:,}", *difference_cells(x)[1:]] for x in differences]
    console.print_table(heads, rows, title=f"{second} (second) against {first} (first)")
    for x in differences:
        if x.only is not None:
            first_only, second_only = x.only
            console.note(
                f"{x.figure.name}: right only by the first: {first_only:,}; only by the second: {second_only:,}"
            )


def _kind(kind: str | None) -> str:
    """Write a kind for the terminal, whatever characters a file has in it."""
    name = name_kind(kind)
    return name if name.isprintable() else repr(name)
