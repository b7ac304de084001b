"""The options of `vlm eval`: what is asked, how answers are marked, and which files are written."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vlm_cli.cli.command import option
from vlm_cli.cli.options import (
    MAX_ROWS,
    ColumnsOption,
    ImageFolderOption,
    MaxPixelsOption,
    MaxTilesOption,
    MediaRootOption,
)
from vlm_cli.cli.prompts import ChatTemplateOption, SpecialTokensOption, SystemOption
from vlm_cli.cli.sampling import MAX_NEW_TOKENS
from vlm_cli.data.inputs import is_stdin
from vlm_cli.data.records import Reading
from vlm_cli.errors import UsageError

__all__ = ["MarkingOptions", "OutputOptions", "QuestionOptions"]

QUESTIONS, MARKING, FILES = "Questions", "Marking", "Output"  # headings in --help

MAX_RECORDS = 1_000_000_000  # of a file


@dataclass(frozen=True)
class QuestionOptions:
    """What the model is asked, and how many items at once."""

    data: Annotated[
        Path | None,
        option(
            QUESTIONS,
            "Records with questions and right answers: JSON lines, JSON, Parquet, the files of benchmarks and what "
            "else `vlm train` reads, or - for stdin. Of a conversation, each answer is asked for behind the turns "
            "before it. Required.",
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
class MarkingOptions:
    """How answers are marked, and what they are compared with."""

    metric: Annotated[
        str | None,
        option(
            MARKING,
            "Mark the answers by NAME, or by several with commas between: exact, normalised, vqa, anls, relaxed, "
            "multiple-choice, choice-likelihood, choice-likelihood-mean, yes-no, mme, cider, bleu, rouge-l. The "
            "default is that of the benchmark, or what the records allow: multiple-choice, vqa, exact.",
            metavar="NAME",
        ),
    ] = None
    control: Annotated[
        str | None,
        option(
            MARKING,
            "Ask each question with the picture of another one (wrong-image), or without any (no-image): what the "
            "model guesses without looking.",
            metavar="wrong-image|no-image",
        ),
    ] = None


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
