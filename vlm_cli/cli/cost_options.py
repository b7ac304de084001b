"""The options of `vlm cost`, and the workloads that they mean."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_dtypes, complete_subjects
from vlm_cli.cli.options import DTYPES, MAX_ROWS, OUTPUT
from vlm_cli.errors import UsageError

if TYPE_CHECKING:
    from vlm_cli.costs.workload import Workload

__all__ = ["AgainstOption", "CrossingOption", "CsvOption", "PlotOption", "WorkloadOptions", "parse_numbers"]

PROMPT, COMPARE, TRAINING = "Prompt", "Comparison", "Learning"
MOST = 2**20  # tokens, pictures or frames

AgainstOption = Annotated[
    str | None,
    option(
        COMPARE,
        "Count OTHER beside MODEL: a fusion's name (MODEL with that fusion), or another model, family or composition "
        "file, to which the options of MODEL's composition apply, too.",
        metavar="OTHER",
        autocompletion=complete_subjects,
    ),
]
CrossingOption = Annotated[
    bool,
    option(
        COMPARE,
        "With --against: say from how many text tokens on which of the two costs less, by operations, memory and "
        "seconds. Takes about a minute.",
        "--crossing",
    ),
]
CsvOption = Annotated[bool, option(OUTPUT, "Print comma-separated values.", "--csv")]
PlotOption = Annotated[
    Path | None,
    option(OUTPUT, "Draw the costs over the text, or over the pictures, into FILE (.svg or .png).", metavar="FILE"),
]


@dataclass(frozen=True)
class WorkloadOptions:
    """Sizes of prompts. Each list gives a row of the table for each of its numbers."""

    pictures: Annotated[
        str, option(PROMPT, "Number of pictures, or of clips, before the text.", metavar="N,…")
    ] = "1"  # fmt: skip
    size: Annotated[
        str | None,
        option(PROMPT, "Width and height of each picture in pixels, which decide its tiles: 640x480.", metavar="WxH,…"),
    ] = None
    tiles: Annotated[
        str | None, option(PROMPT, "Number of tiles of each picture, instead of --size.", metavar="N,…")
    ] = None
    frames: Annotated[
        str | None, option(PROMPT, "Number of frames of each clip, instead of pictures.", metavar="N,…")
    ] = None
    text: Annotated[str, option(PROMPT, "Tokens of text after the pictures.", metavar="N,…")] = "64"
    batch_size: Annotated[
        int, option(PROMPT, "Equal prompts that are read at a time.", metavar="N", min=1, max=MAX_ROWS)
    ] = 1
    dtype: Annotated[
        str,
        option(
            PROMPT,
            "Dtype of the weights of a model that answers; auto takes that of the files.",
            metavar=DTYPES,
            autocompletion=complete_dtypes,
        ),
    ] = "auto"

    def workloads(self) -> list[Workload]:
        """Return every combination of the numbers, pictures first.

        Raises:
            UsageError: naming the option whose value is no list of numbers.
        """
        from vlm_cli.costs.workload import Workload

        if sum(x is not None for x in (self.size, self.tiles, self.frames)) > 1:
            raise UsageError("--size, --tiles and --frames exclude each other: a clip is not cut. Choose one.")
        views: list[dict[str, object]] = [{}]
        if self.size is not None:
            views = [{"size": size} for size in _parse_sizes(self.size)]
        for name in ("tiles", "frames"):
            if (given := getattr(self, name)) is not None:
                views = [{name: x} for x in parse_numbers(given, f"--{name}")]
        pictures, texts = parse_numbers(self.pictures, "--pictures", least=0), parse_numbers(self.text, "--text")
        return [
            Workload(pictures=n, text=text, rows=self.batch_size, **view)  # type: ignore[arg-type]
            for n, view, text in itertools.product(pictures, views, texts)
        ]


def parse_numbers(text: str, flag: str, *, least: int = 1) -> list[int]:
    """Read numbers with commas between, each once.

    >>> parse_numbers("1,2,8", "--pictures")
    [1, 2, 8]

    Raises:
        UsageError: naming the option.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,7}", word) and least <= int(word) <= MOST for word in words):
        raise UsageError(
            f"{flag} expects whole numbers from {least} to {MOST:,} with commas between, such as {flag} 1,2,8; got "
            f"{text!r}."
        )
    return list(dict.fromkeys(map(int, words)))


def _parse_sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"\s*([1-9][0-9]{0,5})[x×]([1-9][0-9]{0,5})\s*", word) for word in text.split(",")]
    if not all(found):
        raise UsageError(
            "--size expects width and height in pixels, each from 1 to 999,999, such as --size 640x480,1024x768; got "
            f"{text!r}."
        )
    return list(dict.fromkeys((int(m[1]), int(m[2])) for m in found if m))
