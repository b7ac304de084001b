"""What a run over a file of prompts depends on, and its options."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vlm_cli.cli.command import option
from vlm_cli.cli.loading import ModelRequest
from vlm_cli.cli.options import MAX_ROWS, MAX_WORKERS, ColumnsOption, ImageFolderOption
from vlm_cli.cli.prompts import ReadingOptions
from vlm_cli.cli.sampling import SamplingOptions, SearchOptions
from vlm_cli.data.formats import ColumnMap
from vlm_cli.data.inputs import is_stdin
from vlm_cli.errors import UsageError
from vlm_cli.schema import show
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from vlm_cli.data.sources import Source
    from vlm_cli.media import MediaLoader

__all__ = ["BatchJob", "BatchOptions", "RayOptions", "RowOptions"]

BATCH = "Batch"  # heading of these options in --help


@dataclass(frozen=True)
class BatchOptions:
    """Where answers go, and how many rows are answered at once."""

    output: Annotated[
        str | None,
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
        return self.output is not None and self.output == "-"

    @property
    def given(self) -> list[str]:
        """The options that the user gave."""
        return [f"--{name.replace('_', '-')}" for name, x in asdict(self).items() if x != getattr(BatchOptions(), name)]

    def check(self, name: str) -> None:
        """Refuse what cannot be done.

        Args:
            name: of the input.

        Raises:
            UsageError: without an output file, with one that is the input, or for a batch size that is no number.
        """
        if self.output is None:
            raise UsageError(f"no output file is named: vlm batch {name} --output OUT.jsonl")
        if self.prints and self.overwrite:
            raise UsageError("--output - writes to stdout, where --overwrite has nothing to replace. Leave it out.")
        is_file = not (self.prints or is_stdin(Path(name)))
        if is_file and Path(name).resolve() == Path(self.output).resolve():
            raise UsageError(f"the input and --output are the same file, {name!r}. Choose another name.")
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
class RayOptions:
    """How many processes answer, and what each has."""

    engine: Annotated[
        str,
        option(
            BATCH,
            "local answers in this process; ray in a pool of processes, on the Ray cluster that RAY_ADDRESS names if "
            "there is one. --output is then a directory or a URL such as s3://BUCKET/answers, with a file for each "
            "piece of the input.",
            "--engine",
            metavar="local|ray",
        ),
    ] = "local"
    actors: Annotated[int, option(BATCH, "Processes of --engine ray.", "--actors", min=1, max=100_000)] = 2
    actor_cpus: Annotated[
        float,
        option(
            BATCH,
            "Cores that Ray reserves for a process. Leave some free: Ray's own readers need them.",
            "--actor-cpus",
            min=0.0,
            max=1_000.0,
        ),
    ] = 0.5
    actor_gpus: Annotated[
        float, option(BATCH, "GPUs that Ray reserves for a process.", "--actor-gpus", min=0.0, max=100.0)
    ] = 0.0
    part_rows: Annotated[
        int, option(BATCH, "Rows of a file of answers with --engine ray.", "--part-rows", min=1, max=10_000_000)
    ] = 1_000
    part_format: Annotated[
        str, option(BATCH, "Format of the files of --engine ray.", "--part-format", metavar="jsonl|parquet")
    ] = "jsonl"

    def check(self) -> bool:
        """Tell whether Ray answers.

        Raises:
            UsageError: for another engine or format, or an option that has no effect.
        """
        if self.engine not in ("local", "ray"):
            raise UsageError(f"--engine knows local and ray, got {show(self.engine)}.")
        if self.part_format not in ("jsonl", "parquet"):
            raise UsageError(f"--part-format knows jsonl and parquet, got {show(self.part_format)}.")
        changed = [name for name, x in asdict(self).items() if name != "engine" and x != getattr(RayOptions(), name)]
        if self.engine == "local" and changed:
            raise UsageError(f"--{changed[0].replace('_', '-')} has no effect without --engine ray.")
        return self.engine == "ray"


@dataclass(frozen=True)
class RowOptions:
    """How the rows of the input are read."""

    columns: ColumnsOption = None
    image_folder: ImageFolderOption = None

    @property
    def format(self) -> ColumnMap | None:
        """The columns that the user names; None recognises each row.

        Raises:
            UsageError: if they cannot be read.
        """
        return None if self.columns is None else ColumnMap.parse(self.columns, needs_answer=False)

    def settings(self) -> dict[str, Any]:
        """Return what the user gave, by option."""
        given = {"--columns": self.columns, "--image-folder": self.image_folder and str(self.image_folder.resolve())}
        return {name: x for name, x in given.items() if x is not None}


@dataclass(frozen=True)
class BatchJob:
    """Everything that a run over a file depends on.

    Attributes:
        name: of the input: a source, or - for standard input.
    """

    request: ModelRequest
    name: str
    options: BatchOptions
    reading: ReadingOptions
    choice: TemplateChoice
    sampling: SamplingOptions
    search: SearchOptions
    rows: RowOptions = RowOptions()

    def loader(self, source: Source) -> MediaLoader:
        """Make the loader of the pictures of a source."""
        folder = self.rows.image_folder or source.folder
        return self.reading.loader(folder, self.request.source.allow_hosts, source.bytes_of)

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
            **self.rows.settings(),
            **{f"--{name.replace('_', '-')}": x for name, x in values.items()},
        }
