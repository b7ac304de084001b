"""A run over a file of prompts: its input, its journal, and what it tells when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.batch_answering import PromptRun, RequestRun, Run, request_defaults
from vlm_cli.cli.batch_options import BatchJob
from vlm_cli.cli.batch_result import BatchResult
from vlm_cli.cli.loading import LoadedModel, keep_collecting
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.data.formats.requests import begins_with_request, note_ids
from vlm_cli.data.inputs import is_pipe, read_lines
from vlm_cli.data.sources import Row, Source, open_source
from vlm_cli.data.sources.remote import is_remote
from vlm_cli.errors import DataError, UsageError
from vlm_cli.interrupt import Interrupted, at_signal, deferred_signals
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from vlm_cli.generation.journal import Journal

__all__ = ["answer_file"]


def answer_file(job: BatchJob, *, as_json: bool, stats: bool) -> None:
    """Answer every prompt of a file, or resume where an earlier run ended, and print what was done.

    Raises:
        VLMError: if the input or the output cannot be used. The answers that exist are kept.
        Exit: with code 1 if a prompt could not be answered.
    """
    if job.options.prints and as_json:
        raise UsageError("--output - and --json both write to stdout. Leave one of them out.")
    result = _answer_file(job)
    console.note(result.summary())
    if result.failed:
        console.notify(
            f"{result.failed:,} of {count_of(result.rows, 'row')} could not be answered; "
            + ('their lines have an "error".' if result.failed > 1 else 'its line has an "error".')
        )
    if not job.options.prints:
        console.notify(f"Wrote {job.options.output}")
    if as_json:
        files = {"model": job.request.name, "batch": job.name, "output": str(job.options.output)}
        console.print_json(files | result.to_dict())
    if stats:
        console.notify(result.statistics())
    if result.failed:
        raise typer.Exit(1)


def _answer_file(job: BatchJob) -> BatchResult:
    from vlm_cli.generation.journal import Journal

    assert job.options.output is not None
    if is_remote(job.options.output):
        raise UsageError("only --engine ray writes to an object store. Add --engine ray, or give a FILE.")
    work = _Work.open(job)
    journal: Journal | PrintedAnswers = (
        PrintedAnswers()
        if job.options.prints
        else Journal.open(Path(job.options.output), job.settings(), overwrite=job.options.overwrite)
    )
    try:
        with at_signal(lambda: _leave(job, journal)):
            journal.skip(work.rows, work.source.quoted)
            if journal.answered:
                console.note(f"Resuming after {count_of(journal.answered, 'row')}, answered in {journal.name}.")
            result = _answer_rest(work, journal)
        if not journal.answered:
            raise DataError(
                f'{job.name!r} holds no prompts. Write one JSON object a line: {{"prompt": "<image:a.png>A photo of"}}'
            )
        with deferred_signals() as received:
            journal.finish()
        if received.number is not None:
            raise Interrupted(f"All rows are answered, and {job.options.output} is written.", received.number)
    except Interrupted:
        raise
    except BaseException:
        if kept := _leave(job, journal):
            console.notify(kept)
        raise
    return result


@dataclass
class PrintedAnswers:
    """Answers on stdout, in place of a journal: no later run resumes this one.

    Attributes:
        answered: rows that are printed.
        failed: those of them with an error.
        name: where the answers are.
    """

    answered: int = 0
    failed: int = 0
    name: str = "stdout"

    def skip(self, rows: Iterator[Row], name: str) -> None:
        """Skip no row: nothing is answered yet."""

    def add(self, row: Row, answer: Mapping[str, Any]) -> None:
        """Print an answer."""
        from vlm_cli.generation.journal import has_failed

        console.print_json(answer, indent=None)
        self.answered += 1
        self.failed += has_failed(answer)

    def finish(self) -> None:
        """Do nothing: all answers are printed."""

    def close(self, *, remove: bool = False) -> None:
        """Do nothing: stdout stays open."""


def _leave(job: BatchJob, journal: Journal | PrintedAnswers) -> str:
    """Close the journal of a run that ends early, and say what it keeps; remove it if it keeps no answer."""
    journal.close(remove=not journal.answered)
    if not journal.answered or job.options.prints:
        return ""
    again = "the same command without --overwrite" if job.options.overwrite else "the same command"
    return f"{journal.name} keeps {count_of(journal.answered, 'answer')}; run {again} to resume."


@dataclass
class _Work:
    """The input of a run.

    Attributes:
        rows: from the first one on.
        total: number of rows, if counting them costs little.
        are_requests: whether they are requests of OpenAI's protocol.
        first: for each id of a request, the place of the row that has it first.
    """

    job: BatchJob
    source: Source
    rows: Iterator[Row]
    total: int | None
    are_requests: bool
    first: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, job: BatchJob) -> _Work:
        """Open the input, and look at its first row.

        Raises:
            DataError: if it cannot be read.
            UsageError: for options that its rows do not go with.
        """
        format = job.rows.format
        source = open_source(job.name)
        source.keeps_lines = True
        is_counted = source.kind == "JSON lines" and len(source.shards) == 1 and not is_pipe(Path(job.name))
        total = sum(1 for raw in read_lines(Path(job.name)) if raw.strip()) if is_counted else None
        rows = source.all_rows()
        are_requests = False
        if format is None:
            are_requests, rows = begins_with_request(rows)
        work = cls(job, source, rows, total, are_requests)
        if are_requests:
            request_defaults(job)
            work.rows = note_ids(rows, work.first)
        return work

    def run(self, loaded: LoadedModel, progress: ProgressLine) -> Run:
        """Choose how its rows are answered."""
        if self.are_requests:
            return RequestRun(self.job, loaded, self.source, progress.notify, self.first)
        return PromptRun(self.job, loaded, self.source, progress.notify)


def _answer_rest(work: _Work, journal: Journal | PrintedAnswers) -> BatchResult:
    """Answer the rows that are left; without any, no model is loaded."""
    from itertools import chain

    job, earlier = work.job, journal.answered
    first = next(work.rows, None)
    if first is None:
        return BatchResult(journal.answered, journal.failed, earlier)
    loaded = job.request.load()
    keep_collecting()
    console.note(f"Images: {loaded.processor.image_processor.describe()}")
    with ProgressLine(work.total, noun="rows", done_before=earlier, has_summary=False) as progress:
        run = work.run(loaded, progress)
        started = time.monotonic()
        with closing(run.answer(chain([first], work.rows))) as answered:
            for row in answered:
                journal.add(row.origin, row.to_dict())
                progress.show(journal.answered)
    for note in run.notes():
        console.note(note)
    return BatchResult(
        journal.answered,
        journal.failed,
        earlier,
        run.counts,
        run.batch_size,
        loaded.seconds,
        time.monotonic() - started,
        console.peak_memory(loaded.model.device),
    )
