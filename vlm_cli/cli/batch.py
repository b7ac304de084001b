"""`vlm generate --batch`: the prompts of a file, and a file of answers."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.loading import keep_collecting
from vlm_cli.cli.options import SamplingOptions
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.errors import DataError, UsageError
from vlm_cli.models import hub_arguments

__all__ = ["BatchOptions", "BatchRun", "files_digest"]

BATCH = "Batch"
CACHE_BYTES = 2**30  # bytes of images, or of their vision tokens, that wait or may be shown again


@dataclass(frozen=True)
class BatchOptions:
    """A file of prompts, and how it is answered."""

    batch: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Prompts, JSONL; its paths start there; - reads stdin.", rich_help_panel=BATCH
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answers, JSONL; an unfinished file is gone on with.",
                     rich_help_panel=BATCH),
    ] = None  # fmt: skip
    batch_size: Annotated[
        str, typer.Option("--batch-size", "-b", help="Rows at once: auto, or a number.", rich_help_panel=BATCH)
    ] = "auto"
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images.", rich_help_panel=BATCH)] = (
        None
    )
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUTPUT; forget an unfinished run.", rich_help_panel=BATCH),
    ] = False

    def wanted(self, others: Sequence[str]) -> bool:
        """Whether a file is to be answered.

        Args:
            others: flags that were given and mean a single prompt.

        Raises:
            UsageError: for flags that do not go together.
        """
        if self.batch is None:
            flags = {
                "--output": self.output is not None,
                "--batch-size": self.batch_size != "auto",
                "--workers": self.workers is not None,
                "--overwrite": self.overwrite,
            }
            if lone := next((flag for flag, is_given in flags.items() if is_given), None):
                raise UsageError(
                    f"{lone} is for a file of prompts. Add --batch FILE.jsonl, or leave it out; the answer to one "
                    "prompt goes to stdout."
                )
            return False
        if others:
            reasons = {
                "--dry-run": "shows the layout of one prompt",
                "--chat": "is one conversation, and the lines of a batch are answered apart",
                "--no-stream": "is for an answer on stdout, and a batch writes to a file",
                "--compile": "is for one long answer: each shape of a batch would be compiled for itself",
            }
            reason = reasons.get(others[0], "gives one prompt, and each line of a batch brings its own")
            raise UsageError(f"{others[0]} {reason}. Leave out {others[0]} or --batch.")
        if self.output is None:
            raise UsageError(f"no output file is named: vlm generate --batch {self.batch} --output OUT.jsonl")
        if self.batch != "-" and Path(self.batch).resolve() == self.output.resolve():
            raise UsageError(f"--batch and --output are the same file, {self.batch!r}. Choose another name.")
        self.rows_at_once()
        return True

    def rows_at_once(self) -> int | None:
        """None if that is to be found.

        Raises:
            UsageError: for what is no number.
        """
        if self.batch_size == "auto":
            return None
        if not self.batch_size.isdecimal() or int(self.batch_size) < 1:
            raise UsageError(f"--batch-size expects auto or a number of rows from 1 on, got {self.batch_size!r}.")
        return int(self.batch_size)

    def num_workers(self) -> int:
        import os

        return min(4, max(0, (os.cpu_count() or 1) - 1)) if self.workers is None else self.workers

    def read(self) -> Iterator[bytes]:
        """Lines of the input, one at a time.

        Raises:
            DataError: if it cannot be read.
        """
        from vlm_cli.data.jsonl import read_lines

        if self.batch != "-":
            return read_lines(Path(str(self.batch)))
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("--batch - reads standard input, but nothing is piped in. Add `< FILE.jsonl`.")
        return iter(sys.stdin.buffer)

    def count(self) -> int | None:
        """Rows of the input; None if only its end will tell."""
        return None if self.batch == "-" else sum(1 for raw in self.read() if raw.strip())

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return Path() if self.batch == "-" else Path(str(self.batch)).absolute().parent


def files_digest(built: str, revision: str | None) -> str:
    """Of names, sizes and times of a model's files, or the commit of a hub id: whether it is still the same."""
    import hashlib

    folder = Path(built)
    if folder.is_dir():
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats if name != "README.md"]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    from vlm_cli.checkpoint.directory import read_config

    return str(getattr(read_config(built, **hub_arguments(revision)), "_commit_hash", None))


@dataclass
class BatchRun:
    """One run over a file, and what is said of it.

    Args:
        options: the user's.
        sampling: the user's.
        load: makes the model, its processor, and the seconds that this took.
        depends_on: other flags and values on which answers depend.
        allow_urls: fetch `http(s)://` images.
        special_tokens: read the spelling of special tokens as tokens.
    """

    options: BatchOptions
    sampling: SamplingOptions
    load: Callable[[], tuple[Any, Any, float]]
    depends_on: dict[str, Any]
    allow_urls: bool = False
    special_tokens: bool = False

    def answer(self) -> None:
        """Write an answer for every row of the input, or go on where an earlier run ended.

        Raises:
            VLMError: if the input or the output cannot be used. What is answered is kept.
        """
        from vlm_cli.data.jsonl import number_lines
        from vlm_cli.generation.journal import Journal

        assert self.options.output is not None
        total, lines = self.options.count(), number_lines(self.options.read())
        flags = {f"--{name.replace('_', '-')}": x for name, x in asdict(self.sampling).items()}
        journal = Journal.open(self.options.output, {**self.depends_on, **flags}, overwrite=self.options.overwrite)
        self.journal = journal
        try:
            journal.skip(lines, "standard input" if total is None else repr(self.options.batch))
            self.before = journal.answered
            if self.before:
                console.notify(f"Going on after {self.before:,} rows that are answered in {journal.path}.")
            self._answer_rest(lines, total)
            if not journal.answered:
                raise DataError(
                    f"{self.options.batch!r} holds no prompts. Write one JSON object a line: "
                    '{"prompt": "<image:a.png>A photo of"}'
                )
            journal.finish()
        except BaseException:
            if journal.answered:
                again = "the same command without --overwrite" if self.options.overwrite else "the same command"
                console.notify(f"{journal.answered:,} answers are kept in {journal.path}; {again} goes on.")
            journal.close(remove=not journal.answered)
            raise
        self._tell()

    def _answer_rest(self, lines: Iterator[Any], total: int | None) -> None:
        """Answer the lines that are left; without any, no model is loaded."""
        self.counts, self.seconds, self.load_seconds, self.rows_at_once = None, 0.0, 0.0, 0
        first = next(lines, None)
        if first is None:
            return
        from vlm_cli.quiet import silence_libraries

        silence_libraries()
        self.model, processor, self.load_seconds = self.load()
        keep_collecting()
        journal, started = self.journal, time.monotonic()
        progress = ProgressLine(total, noun="rows", done_before=self.before, has_summary=False)
        with progress:
            answerer, rows = self._pipeline(processor, chain([first], lines), progress.notify)
            with closing(rows):
                for row in answerer.answer(rows):
                    journal.add(row.line, row.answer())
                    progress.show(journal.answered)
        self.seconds = time.monotonic() - started
        self.counts, self.rows_at_once = answerer.counts, answerer.size.rows

    def _pipeline(self, processor: Any, lines: Iterator[Any], notify: Callable[[str], None]) -> tuple[Any, Any]:
        """What answers, and the rows that are put to it."""
        from vlm_cli.generation.answers import RowAnswerer, token_bytes
        from vlm_cli.generation.batch_size import BatchSize
        from vlm_cli.generation.decoder import Decoder
        from vlm_cli.generation.images import ImageCache, Preprocessor, with_images
        from vlm_cli.generation.rows import RowReader
        from vlm_cli.media import MediaLoader

        decoder = Decoder(self.model, processor, self.sampling.keywords(), self.sampling.stop or ())
        channels, height, width = processor.image_processor.frame_shape
        most = max(1, CACHE_BYTES // max(4 * channels * height * width, token_bytes(self.model)))
        answerer = RowAnswerer(
            decoder,
            BatchSize(self.options.rows_at_once()),
            seed=self.sampling.seed,
            max_images=most,
            notify=notify,
        )
        reader = RowReader(decoder, self.special_tokens)
        loader = MediaLoader(self.options.folder, allow_urls=self.allow_urls)
        preprocessor = Preprocessor(processor.image_processor.transform, loader)
        rows = with_images(map(reader.read, lines), ImageCache(most), preprocessor, self.options.num_workers())
        return answerer, rows

    @property
    def failed(self) -> int:
        """Rows with an error, those of an earlier run included."""
        return self.journal.failed

    def _tell(self) -> None:
        data = self.to_dict()
        earlier = f" ({self.before:,} of them earlier)" if self.before else ""
        console.notify(
            f"{data['rows']:,} rows{earlier}, {data['failed']:,} failed, {data['rows_per_second']:.1f} rows/s, "
            f"{data['tokens_per_second']:.1f} tokens/s, {data['images_encoded']:,} images encoded of "
            f"{data['images']:,} used"
        )
        if self.failed:
            console.notify(
                f'{self.failed:,} of {data["rows"]:,} rows could not be answered; their lines have an "error".'
            )
        console.notify(f"Wrote {self.options.output}")

    def to_dict(self) -> dict[str, Any]:
        """What was done; rates and images are of this run alone."""
        from vlm_cli.generation.answers import Counts

        counts, seconds = self.counts or Counts(), self.seconds or 1.0
        return {
            "batch": self.options.batch,
            "output": str(self.options.output),
            "rows": self.journal.answered,
            "failed": self.journal.failed,
            "earlier": self.before,
            "new_tokens": counts.new_tokens,
            "images": counts.images,
            "images_encoded": counts.encoded,
            "positions_reused": counts.reused,
            "batch_size": self.rows_at_once,
            "load_seconds": round(self.load_seconds, 3),
            "seconds": round(self.seconds, 3),
            "rows_per_second": round((self.journal.answered - self.before) / seconds, 2),
            "tokens_per_second": round(counts.new_tokens / seconds, 2),
        }

    def statistics(self) -> str:
        if self.counts is None:
            return "no row was left to answer"
        return (
            f"{self.counts.new_tokens:,} new tokens in {self.seconds:.2f} s, {self.counts.seconds:.2f} s of them in "
            f"the model, {self.rows_at_once} rows at once in the end, load {self.load_seconds:.2f} s, "
            f"peak memory {console.human_bytes(console.peak_memory(self.model.device))}"
        )
