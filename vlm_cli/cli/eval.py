"""`vlm eval`: questions with known answers, and how many a model answers right."""

from __future__ import annotations

import io
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.loading import LoadedModel, ModelRequest, keep_collecting
from vlm_cli.cli.options import (
    MAX_ROWS,
    ColumnsOption,
    ImageFolderOption,
    JsonOption,
    MaxPixelsOption,
    MaxTilesOption,
    MediaRootOption,
    PlacementOptions,
    QuietOption,
    SourceOptions,
    flatten_options,
)
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.prompts import ChatTemplateOption, SpecialTokensOption, SystemOption
from vlm_cli.cli.sampling import MAX_NEW_TOKENS, SamplingOptions, cut_note
from vlm_cli.data.inputs import is_stdin
from vlm_cli.data.records import Reading
from vlm_cli.errors import DataError, UsageError
from vlm_cli.models import DEMO
from vlm_cli.printable import count_of
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.data.records import Records
    from vlm_cli.evaluation.items import Item
    from vlm_cli.evaluation.run import Evaluation
    from vlm_cli.evaluation.scores import Score

__all__ = ["EvalOptions", "OutputOptions", "evaluate"]

QUESTIONS, FILES = "Questions", "Output"  # headings in --help


MAX_RECORDS = 1_000_000_000  # of a file


@dataclass(frozen=True)
class EvalOptions:
    """What the model is asked, and how many items at once."""

    data: Annotated[
        Path | None,
        option(
            QUESTIONS,
            "Records with questions and right answers: JSON lines, JSON, Parquet and what else `vlm train` reads, or - "
            "for stdin. Of a conversation, each answer is asked for behind the turns before it. Required.",
            "--data",
            "-d",
            metavar="FILE",
        ),
    ] = None
    limit: Annotated[
        int | None,
        option(QUESTIONS, "Ask only the first N records; the default is all.", min=1, max=MAX_RECORDS, metavar="N"),
    ] = None
    columns: ColumnsOption = None
    image_folder: ImageFolderOption = None
    media_root: MediaRootOption = None
    max_pixels: MaxPixelsOption = None
    max_tiles: MaxTilesOption = None
    chat_template: ChatTemplateOption = "auto"
    system: SystemOption = None
    special_tokens: SpecialTokensOption = False
    max_new_tokens: Annotated[
        int,
        option(
            QUESTIONS,
            "Cut an answer after N new tokens.",
            "--max-new-tokens",
            "-n",
            min=1,
            max=MAX_NEW_TOKENS,
            metavar="N",
        ),
    ] = 32
    batch_size: Annotated[
        int,
        option(
            QUESTIONS,
            "Answer N records at once; fewer if memory does not suffice.",
            "--batch-size",
            "-b",
            min=1,
            max=MAX_ROWS,
            metavar="N",
        ),
    ] = 32

    @property
    def reading(self) -> Reading:
        """What the user says of the rows and pictures."""
        return Reading.of(self.media_root, self.max_pixels, self.image_folder, self.columns)


@dataclass(frozen=True)
class OutputOptions:
    """Files to write."""

    html: Annotated[
        Path | None,
        option(
            FILES,
            "Write a web page of pictures and answers to FILE, or to stdout if FILE is -, wrong answers first.",
            metavar="FILE",
        ),
    ] = None
    output: Annotated[
        Path | None,
        option(
            FILES, "Write the answers to FILE (JSONL), or to stdout if FILE is -.", "--output", "-o", metavar="FILE"
        ),
    ] = None
    overwrite: Annotated[bool, option(FILES, "Replace output files that exist.", "--overwrite")] = False

    @property
    def paths(self) -> list[Path]:
        """The files that the user asked for, without stdout."""
        return [path for path in (self.output, self.html) if path is not None and str(path) != "-"]

    @property
    def prints(self) -> str | None:
        """The option whose result goes to stdout; None for none."""
        given = {"--output": self.output, "--html": self.html}
        return next((flag for flag, path in given.items() if path is not None and str(path) == "-"), None)

    def reserved(self, data: Path) -> AbstractContextManager[None]:
        """Refuse files that may not be written, and keep other processes from writing them during the block.

        Raises:
            VLMError: naming the file.
        """
        from vlm_cli.files import reserved_files

        taken = {} if is_stdin(data) else {data.resolve(): "--data"}
        for flag, path in (("--html", self.html), ("--output", self.output)):
            if path is None:
                continue
            if other := taken.get(path.resolve()):
                raise UsageError(f"{flag} and {other} are the same file, {str(path)!r}. Choose another name.")
            taken[path.resolve()] = flag
        return reserved_files(self.paths, overwrite=self.overwrite)


@flatten_options
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Directory that `vlm build` wrote, or hub id.", autocompletion=complete_models
        ),
    ] = DEMO.name,
    questions: EvalOptions = EvalOptions(),
    files: OutputOptions = OutputOptions(),
    devices: PlacementOptions = PlacementOptions(),
    source: SourceOptions = SourceOptions(),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a model questions and count the right answers. The records hold the answers, and a kind for each question.

    A record is a line such as {"kind": "count", "prompt": "<image:cat.jpg>Q: How many cats? A:", "completion": " One."}

    The model takes the most likely token each time, until a stop token. An answer is right if it equals the completion
    exactly, apart from whitespace at both ends. The table shows the share of right answers with its 95 % confidence
    interval (Wilson's).

    Example: vlm eval my-flamingo --data questions.jsonl --html answers.html
    """
    if questions.data is None:
        raise UsageError(f"no questions are given: vlm eval {model} --data FILE.jsonl")
    if files.prints and as_json:
        raise UsageError(f"{files.prints} - and --json both write to stdout. Leave one of them out.")
    with files.reserved(questions.data):
        report = _make_report(model, questions, ModelRequest.of(model, devices, source, max_tiles=questions.max_tiles))
        try:
            report.write(files)
        finally:  # the scores are printed even if the disk is full
            report.print(as_json, to_stderr=files.prints is not None)
    report.check_failed()


def _make_report(model: str, questions: EvalOptions, request: ModelRequest) -> Report:
    """Read the questions, load the model, and ask it."""
    from vlm_cli.evaluation.items import read_items

    assert questions.data is not None
    items, records = read_items(questions.data, questions.limit, questions.reading)
    console.note(f"{count_of(len(items), 'item')} from {questions.data}")
    for note in records.notes:
        console.note(note)
    loaded = request.load()
    return Report(model, loaded, questions, records, _evaluate(loaded, questions, items, records))


def _evaluate(loaded: LoadedModel, questions: EvalOptions, items: list[Item], records: Records) -> Evaluation:
    """Answer the items with the engine of `vlm batch`."""
    from vlm_cli.evaluation.items import encode_items
    from vlm_cli.evaluation.run import evaluate_items
    from vlm_cli.generation.answers import RowAnswerer
    from vlm_cli.generation.batch_size import BatchSize
    from vlm_cli.generation.plan import GenerationPlan

    if any(item.media for item in items):
        console.note(f"Images: {loaded.processor.image_processor.describe()}")
    keywords = SamplingOptions(max_new_tokens=questions.max_new_tokens).keywords()
    writer = loaded.writer(
        TemplateChoice.parse(questions.chat_template), special_tokens=questions.special_tokens, system=questions.system
    )
    plan = GenerationPlan(loaded.model, loaded.processor, keywords, writer=writer)
    encode_items(items, records, plan)
    keep_collecting()
    with ProgressLine(len(items)) as progress:
        answerer = RowAnswerer(plan, BatchSize(questions.batch_size), notify=progress.notify)
        loader = records.loader()
        found = evaluate_items(answerer, items, loader, name=str(questions.data), report=progress.show)
    for note in answerer.picture_notes.lines():
        console.note(note)
    if found.num_cut:
        most = questions.max_new_tokens
        console.note(cut_note(found.num_cut, len(items), most, most))
    return found


@dataclass(frozen=True)
class Report:
    """An evaluation, and what a reader must know to judge it."""

    name: str
    loaded: LoadedModel
    questions: EvalOptions
    records: Records
    found: Evaluation

    def print(self, as_json: bool, *, to_stderr: bool = False) -> None:
        """Print the scores on stdout: a table, or everything as JSON.

        Args:
            as_json: print JSON.
            to_stderr: print one line for each kind on stderr, since stdout holds the answers.
        """
        if to_stderr:
            for kind, score in self.found.kinds.items():
                console.notify(f"{_kind_name(kind)}: {score.exact:,} of {score.items:,} exact")
            console.notify(f"total: {self.found.total.exact:,} of {self.found.total.items:,} exact")
            return
        if as_json:
            console.print_json(self.to_dict())
            return
        rows = [[_kind_name(kind), *_cells(score)] for kind, score in self.found.kinds.items()]
        if list(self.found.kinds) == [None]:
            rows = []  # they are the total
        total = ["total", *_cells(self.found.total)]
        console.print_table(["kind", "items", "exact", "share", "95 % interval"], [*rows, total], total=True)

    def check_failed(self) -> None:
        """Say, after the scores, which items have no answer.

        Raises:
            DataError: if there are any.
        """
        from vlm_cli.evaluation.run import describe_failed

        failed, answered = self.found.failed, len(self.found.answers)
        if failed:
            raise DataError(describe_failed(failed, len(failed) + answered, str(self.questions.data)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, with counts, shares from 0 to 1, and seconds."""
        from vlm_cli.evaluation.scores import RULE

        found = self.found
        return {
            "model": self.name,
            "data": str(self.questions.data),
            "data_sha256": self.records.sha256,
            "device": self.loaded.device,
            "dtype": self.loaded.dtype,
            "batch_size": self.questions.batch_size,
            "max_new_tokens": self.questions.max_new_tokens,
            "limit": self.questions.limit,
            **({"columns": self.questions.columns} if self.questions.columns else {}),
            "chat_template": self.questions.chat_template,
            **({} if self.questions.system is None else {"system": self.questions.system}),
            "special_tokens": self.questions.special_tokens,
            **({"max_tiles": self.questions.max_tiles} if self.questions.max_tiles else {}),
            "rule": RULE,
            "seconds": round(found.seconds, 3),
            "items_per_second": round(len(found.answers) / found.seconds, 1),
            "cut": found.num_cut,
            "total": _numbers(found.total),
            "kinds": [{"kind": kind, **_numbers(score)} for kind, score in found.kinds.items()],
            "answers": [answer.to_dict() for answer in found.answers],
            **({"failed": [item.to_dict() for item in found.failed]} if found.failed else {}),
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
                    answers = (x.to_dict() for x in self.found.in_order())
                    file.writelines(json.dumps(x, ensure_ascii=False, allow_nan=False) + "\n" for x in answers)
                else:
                    self._write_page(file)
        for path in files.paths:
            console.notify(f"Wrote {path}")
        if files.prints == "--output":
            for answer in self.found.in_order():
                console.print_json(answer.to_dict(), indent=None)
        elif files.prints == "--html":
            page = io.StringIO()
            self._write_page(page)
            console.print_lines(page.getvalue())

    def _write_page(self, file: TextIO) -> None:
        from vlm_cli.evaluation.page import write_page

        found, loader = self.found, self.records.loader()
        title = f"{Path(self.name).name} on {self.questions.data}"
        write_page(file, title, self._facts(), found.kinds, found.total, found.answers, loader)

    def _facts(self) -> dict[str, str]:
        """Return what the page says of how the answers were made."""
        questions = self.questions
        return {
            "model": self.name,
            "records": f"{questions.data} (SHA-256 {self.records.sha256[:16]}…)",
            "answers": f"greedy, at most {questions.max_new_tokens} tokens, {self.found.num_cut:,} cut there",
            "computed": f"on {self.loaded.device} in {self.loaded.dtype}, {questions.batch_size} at a time, "
            f"{self.found.seconds:.0f} s",
        }


def _numbers(score: Score) -> dict[str, Any]:
    return {"items": score.items, "exact": score.exact, "share": score.share, "interval": list(score.interval)}


def _kind_name(kind: str | None) -> str:
    """Write a kind for the terminal, whatever characters a file has in it."""
    return "(no kind)" if kind is None else kind if kind.isprintable() else repr(kind)


def _cells(score: Score) -> list[str]:
    low, high = score.interval
    return [
        f"{score.items:,}",
        f"{score.exact:,}",
        f"{100 * score.share:.1f} %",
        f"{100 * low:.1f} – {100 * high:.1f} %",
    ]
