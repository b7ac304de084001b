"""`vlm batch`: the prompts of a file, and a file of answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.loading import ModelOption, ModelRequest, QuantizeOption, keep_collecting
from vlm_cli.cli.options import (
    MAX_ROWS,
    MAX_WORKERS,
    JsonOption,
    PlacementOptions,
    QuietOption,
    SourceOptions,
    StatsOption,
    flatten_options,
)
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.prompts import ReadingOptions
from vlm_cli.cli.sampling import SamplingOptions, SearchOptions, cut_note
from vlm_cli.data.inputs import base_folder, describe_input, is_pipe, is_stdin, read_lines
from vlm_cli.errors import DataError, UsageError, VLMError
from vlm_cli.interrupt import Interrupted, at_signal, deferred_signals
from vlm_cli.models import DEMO
from vlm_cli.printable import count_of
from vlm_cli.schema import show
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.data.jsonl import Line
    from vlm_cli.generation.answers import Counts
    from vlm_cli.generation.journal import Journal

__all__ = ["BatchJob", "BatchOptions", "BatchResult", "PromptFile", "answer_file", "batch"]

BATCH = "Batch"  # heading of these options in --help
MOST_DETAILS = 5  # rows whose errors stderr shows with what only the user may see, such as a file's first bytes


@dataclass(frozen=True)
class BatchOptions:
    """Where answers go, and how many rows are answered at once."""

    output: Annotated[
        Path | None,
        option(
            BATCH,
            "Write answers to FILE (JSONL), or to stdout if FILE is -. An interrupted run resumes from "
            "FILE.partial. Required.",
            "--output",
            "-o",
            metavar="FILE",
        ),
    ] = None
    batch_size: Annotated[
        str,
        option(
            BATCH,
            "Answer N prompts at once; auto finds the fastest number that fits into memory.",
            "--batch-size",
            "-b",
            metavar="N",
        ),
    ] = "auto"
    workers: Annotated[
        int | None,
        option(
            BATCH,
            "Decode images in N processes; 0 uses the main process. The default is the number "
            "of cores less 1, at most 4.",
            min=0,
            max=MAX_WORKERS,
            metavar="N",
        ),
    ] = None
    overwrite: Annotated[
        bool,
        option(BATCH, "Replace the output file, and discard what an interrupted run left.", "--overwrite"),
    ] = False

    @property
    def prints(self) -> bool:
        """Whether the answers go to stdout."""
        return self.output is not None and str(self.output) == "-"

    @property
    def given(self) -> list[str]:
        """The options that the user gave."""
        return [f"--{name.replace('_', '-')}" for name, x in asdict(self).items() if x != getattr(BatchOptions(), name)]

    def check(self, file: PromptFile) -> None:
        """Refuse what cannot be done.

        Raises:
            UsageError: without an output file, with one that is the input, or for a batch size that is no number.
        """
        if self.output is None:
            raise UsageError(f"no output file is named: vlm batch {file.name} --output OUT.jsonl")
        if self.prints and self.overwrite:
            raise UsageError("--output - writes to stdout, where --overwrite has nothing to replace. Leave it out.")
        if not (self.prints or is_stdin(file.path)) and file.path.resolve() == self.output.resolve():
            raise UsageError(f"the input and --output are the same file, {file.name!r}. Choose another name.")
        self.rows_at_once()

    def rows_at_once(self) -> int | None:
        """Return the batch size; None if the run is to find it.

        Raises:
            UsageError: for a batch size that is no number.
        """
        if self.batch_size == "auto":
            return None
        short = self.batch_size.isascii() and self.batch_size.isdecimal() and len(self.batch_size) < 10
        if not short or not 1 <= int(self.batch_size) <= MAX_ROWS:
            raise UsageError(
                f"--batch-size expects auto or a number of rows from 1 to {MAX_ROWS:,}, got {show(self.batch_size)}."
            )
        return int(self.batch_size)

    def num_workers(self) -> int:
        import os

        return min(4, max(0, (os.cpu_count() or 1) - 1)) if self.workers is None else self.workers


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, one JSON object a line.

    Attributes:
        name: its path, or - for standard input.
    """

    name: str

    @property
    def path(self) -> Path:
        return Path(self.name)

    def lines(self) -> Iterator[bytes]:
        """Read the lines, one at a time.

        Raises:
            DataError: if the file cannot be read.
            UsageError: if standard input is a terminal.
        """
        return read_lines(self.path)

    def count(self) -> int | None:
        """Count the prompts; None for a pipe, which can be read only once."""
        return None if is_pipe(self.path) else sum(1 for raw in self.lines() if raw.strip())

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        return base_folder(self.path)

    def __str__(self) -> str:
        return describe_input(self.path)


@flatten_options
def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help='Prompts (JSONL), such as {"prompt": "<image:cat.jpg>A photo of", "id": 7}; image paths start at the '
            "folder of FILE. Give - to read stdin.",
            show_default=False,
        ),
    ],
    batching: BatchOptions = BatchOptions(),
    reading: ReadingOptions = ReadingOptions(),
    model: ModelOption = DEMO.name,
    devices: PlacementOptions = PlacementOptions(),
    quantize: QuantizeOption = None,
    source: SourceOptions = SourceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    search: SearchOptions = SearchOptions(),
    as_json: JsonOption = False,
    stats: StatsOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer every prompt of a file.

    Each line of FILE is a prompt. The output has the same lines in the same order, each with "text" (the answer) or
    "error" added; other keys stay as they are. The exit code is 1 if a prompt could not be answered.

    The model answers many prompts at once, encodes each image once, and reads a beginning that prompts share once.

    Example: vlm batch prompts.jsonl --output answers.jsonl --model my-flamingo
    """
    source_file = PromptFile(file)
    sampling.keywords(search)  # refuses what contradicts itself
    batching.check(source_file)
    request = ModelRequest.of(model, devices, source, quantize=quantize, max_tiles=reading.max_tiles)
    job = BatchJob(request, source_file, batching, reading, reading.choice, sampling, search)
    answer_file(job, as_json=as_json, stats=stats)


@dataclass(frozen=True)
class BatchJob:
    """Everything that a run over a file depends on."""

    request: ModelRequest
    file: PromptFile
    options: BatchOptions
    reading: ReadingOptions
    choice: TemplateChoice
    sampling: SamplingOptions
    search: SearchOptions

    def settings(self) -> dict[str, Any]:
        """Flags and values on which the answers depend; a run with other settings does not resume this one."""
        values = {**asdict(self.sampling), **asdict(self.search)}
        return {
            "--model": self.request.name,
            "the model's files": self.request.digest(),
            "--dtype": self.request.devices.dtype,
            "--quantize": self.request.quantize,
            "--special-tokens": self.reading.special_tokens,
            # An unfinished run of an earlier version has no such settings, and ran without them.
            **({"--chat-template": self.choice.identity} if self.choice.name != "auto" else {}),
            **({} if self.reading.system is None else {"--system": self.reading.system}),
            **({"--max-tiles": self.reading.max_tiles} if self.reading.max_tiles else {}),
            **{f"--{name.replace('_', '-')}": x for name, x in values.items()},
        }


@dataclass(frozen=True)
class BatchResult:
    """What a run over a file has done.

    Attributes:
        rows: that are answered, including those of an earlier run.
        failed: those of them with an error.
        earlier: rows that an earlier run answered.
        counts: what this run did; None if no row was left.
        batch_size: rows at once at the end.
        load_seconds, seconds: of this run, loading the model and answering.
        peak_memory: bytes.
    """

    rows: int
    failed: int
    earlier: int
    counts: Counts | None = None
    batch_size: int = 0
    load_seconds: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers; rates and images are those of this run alone."""
        from vlm_cli.generation.answers import Counts

        counts, seconds = self.counts or Counts(), self.seconds or 1.0
        return {
            "rows": self.rows,
            "failed": self.failed,
            "earlier": self.earlier,
            "new_tokens": counts.new_tokens,
            "images": counts.images,
            "images_encoded": counts.encoded,
            "positions_reused": counts.reused,
            "batch_size": self.batch_size,
            "load_seconds": round(self.load_seconds, 3),
            "seconds": round(self.seconds, 3),
            "rows_per_second": round((self.rows - self.earlier) / seconds, 2),
            "tokens_per_second": round(counts.new_tokens / seconds, 2),
        }

    def summary(self) -> str:
        data = self.to_dict()
        earlier = f" ({self.earlier:,} of them earlier)" if self.earlier else ""
        return (
            f"{count_of(self.rows, 'row')}{earlier}, {self.failed:,} failed, {data['rows_per_second']:.1f} rows/s, "
            f"{data['tokens_per_second']:.1f} tokens/s, {count_of(data['images_encoded'], 'image')} encoded of "
            f"{data['images']:,} used"
        )

    def statistics(self) -> str:
        if self.counts is None:
            return "no row was left to answer"
        return (
            f"{count_of(self.counts.new_tokens, 'new token')} in {self.seconds:.2f} s, {self.counts.seconds:.2f} s of "
            f"them in the model, {count_of(self.batch_size, 'row')} at once in the end, "
            f"load {self.load_seconds:.2f} s, peak memory {console.human_bytes(self.peak_memory)}"
        )


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
        files = {"model": job.request.name, "batch": job.file.name, "output": str(job.options.output)}
        console.print_json(files | result.to_dict())
    if stats:
        console.notify(result.statistics())
    if result.failed:
        raise typer.Exit(1)


def _answer_file(job: BatchJob) -> BatchResult:
    from vlm_cli.data.jsonl import number_lines
    from vlm_cli.generation.journal import Journal

    assert job.options.output is not None
    total, lines = job.file.count(), number_lines(job.file.lines())
    journal: Journal | PrintedAnswers = (
        PrintedAnswers()
        if job.options.prints
        else Journal.open(job.options.output, job.settings(), overwrite=job.options.overwrite)
    )
    try:
        with at_signal(lambda: _leave(job, journal)):
            journal.skip(lines, str(job.file))
            if journal.answered:
                console.note(f"Resuming after {count_of(journal.answered, 'row')}, answered in {journal.name}.")
            result = _answer_rest(job, journal, lines, total)
        if not journal.answered:
            raise DataError(
                f"{job.file.name!r} holds no prompts. Write one JSON object a line: "
                '{"prompt": "<image:a.png>A photo of"}'
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

    def skip(self, lines: Iterator[Line], name: str) -> None:
        """Skip no line: nothing is answered yet."""

    def add(self, line: Line, answer: Mapping[str, Any]) -> None:
        """Print an answer."""
        console.print_json(answer, indent=None)
        self.answered += 1
        self.failed += "error" in answer

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


def _answer_rest(
    job: BatchJob, journal: Journal | PrintedAnswers, lines: Iterator[Line], total: int | None
) -> BatchResult:
    """Answer the lines that are left; without any, no model is loaded."""
    earlier = journal.answered
    first = next(lines, None)
    if first is None:
        return BatchResult(journal.answered, journal.failed, earlier)
    from vlm_cli.data.meant import mention_notes
    from vlm_cli.generation.answers import RowAnswerer
    from vlm_cli.generation.batch_size import BatchSize
    from vlm_cli.generation.plan import GenerationPlan
    from vlm_cli.generation.rows import RowReader

    loaded = job.request.load()
    keep_collecting()
    console.note(f"Images: {loaded.processor.image_processor.describe()}")
    keywords, stops = job.sampling.keywords(job.search), job.sampling.stop or ()
    writer = loaded.writer(job.choice, special_tokens=job.reading.special_tokens, system=job.reading.system)
    plan = GenerationPlan(loaded.model, loaded.processor, keywords, stops, writer)
    loader = job.reading.loader(job.file.folder, job.request.source.allow_hosts)
    reader = RowReader(plan, loader)
    started = time.monotonic()
    details = 0  # messages that stderr shows in full
    mentions: list[tuple[str, str]] = []
    cut: list[int] = []  # tokens of the answer to each row that --max-new-tokens or the context cut
    is_unjudged = job.request.is_demo  # whether a picture is to show that these are photographs
    with ProgressLine(total, noun="rows", done_before=earlier, has_summary=False) as progress:
        size = BatchSize(job.options.rows_at_once())
        answerer = RowAnswerer(plan, size, seed=job.sampling.seed, notify=progress.notify)
        rows = map(reader.read, chain([first], lines))
        with closing(answerer.answer(rows, loader, workers=job.options.num_workers())) as answered:
            for row in answered:
                journal.add(row.source_line, row.to_dict())
                if row.error is not None and str(row.error) != row.error.public and details < MOST_DETAILS:
                    details += 1
                    progress.notify(f"  line {row.line}: {row.error}")
                mentions += [(f"line {row.line}", name) for name in row.mentions]
                if is_unjudged and row.sources:
                    is_unjudged = False
                    with suppress(VLMError):
                        job.request.warn_of_photographs(
                            [loader.load_medium(row.sources[0].source, row.sources[0].kind)]
                        )
                cut_here = [x.new_tokens for x in row.answers or () if x.finish_reason == "length"]
                cut += [max(cut_here)] if cut_here else []
                progress.show(journal.answered)
    for note in [*mention_notes(mentions), *answerer.picture_notes.lines()]:
        console.note(note)
    if cut:
        console.note(cut_note(len(cut), answerer.counts.rows, max(cut), job.sampling.max_new_tokens))
    return BatchResult(
        journal.answered,
        journal.failed,
        earlier,
        answerer.counts,
        answerer.size.rows,
        loaded.seconds,
        time.monotonic() - started,
        console.peak_memory(loaded.model.device),
    )
