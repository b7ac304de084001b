"""A question, and the flags that all of them take."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.speed.models import SIZES, Models
from benchmarks.speed.results import ROW_HEAD, Report, bars_table, markdown_table

__all__ = ["Question", "Settings", "answer", "command", "run"]

SizeName = Literal["small", "standard", "large", "7b", "all"]
DtypeName = Literal["float32", "bfloat16", "float16"]
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the flags say.

    Attributes:
        sizes: names in `SIZES`.
        pairs: of each comparison.
        few: pairs of comparisons that take minutes.
        open_flamingo: a checkout of the reference.
        out: folder of the results.
        threads: of torch.
        device: that runs the models.
        dtype: of their weights.
    """

    sizes: tuple[str, ...] = ("standard",)
    pairs: int = 7
    open_flamingo: Path | None = None
    out: Path = RESULTS
    threads: int = 1
    device: str = "cpu"
    dtype: DtypeName = "float32"

    @property
    def name(self) -> str:
        """What the names of result files begin with: the day, and the GPU if there is one."""
        day = date.today().isoformat()
        if not self.device.startswith("cuda"):
            return day
        words = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(self.device).lower()).strip("-")
        return f"{day}-{words}"

    @property
    def few(self) -> int:
        return min(self.pairs, 3)

    def flags(self, *, paths: bool = True) -> list[str]:
        """The flags again; without `paths`, only that they were there."""
        flags = ["--quick"] if self.sizes == ("tiny",) else ["--size", _name(self.sizes)]
        flags += ["--pairs", str(self.pairs), "--threads", str(self.threads)]
        if (self.device, self.dtype) != ("cpu", "float32"):
            flags += ["--device", self.device, "--dtype", self.dtype]
        if self.open_flamingo is not None:
            flags += ["--open-flamingo", str(self.open_flamingo) if paths else "PATH"]
        return flags + (["--out", str(self.out)] if paths else [])


@dataclass(frozen=True, kw_only=True)
class Question:
    """One script.

    Attributes:
        name: of its module.
        asks: what is compared with what.
        measure: adds what it finds to a report, at one size.
        sizes: at which it is asked; --size leaves out the others.
        devices: kinds of devices on which it is asked.
    """

    name: str
    asks: str
    measure: Callable[[Report, Models, Settings], None]
    sizes: tuple[str, ...] = field(default=("tiny", "small", "standard", "large", "7b"))
    devices: tuple[str, ...] = ("cpu", "cuda")


def answer(question: Question, settings: Settings) -> Report:
    """Measure, and write `DATE-QUESTION.json`."""
    words = ["python", "-m", f"benchmarks.speed.{question.name}", *settings.flags(paths=False)]
    sizes = [name for name in settings.sizes if name in question.sizes]
    told = {
        "sizes": {name: SIZES[name].to_dict() for name in sizes},
        "pairs": settings.pairs,
        "threads": settings.threads,
        "dtype": settings.dtype,
        "device": settings.device,
    }
    report = Report(question.name, question.asks, " ".join(words), told)
    started = time.monotonic()
    with _quiet(), _threads(settings.threads), tempfile.TemporaryDirectory() as scratch:
        for name in sizes:
            folder = Path(scratch) / name
            folder.mkdir()
            dtype = getattr(torch, settings.dtype)
            models = Models(SIZES[name], folder, settings.open_flamingo, settings.device, dtype)
            question.measure(report, models, settings)
    report.seconds = round(time.monotonic() - started, 1)
    report.write(settings.out, settings.name)
    return report


def run(question: Question) -> None:
    """The script of one question."""

    def main(settings: Settings) -> None:
        report = answer(question, settings)
        if report.rows:
            print(markdown_table(ROW_HEAD, [row.cells() for row in report.rows]))
        for table in report.tables:
            print(f"\n{table.title}\n\n{markdown_table(table.head, table.rows)}")
        if report.bars:
            print(f"\n{bars_table(report.bars)}")
        for note in report.notes:
            print(f"- {note}")
        print(f"{report.seconds:.0f} s")

    typer.run(command(main, question.asks))


def command(main: Callable[[Settings], None], asks: str) -> Callable[..., None]:
    """`main` with the flags that all scripts take."""

    def with_flags(
        size: Annotated[SizeName, typer.Option(help="Size of the models.")] = "standard",
        pairs: Annotated[int, typer.Option(metavar="N", min=1, help="Measure each comparison in N pairs of runs.")] = 7,
        open_flamingo: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help="Checkout of mlfoundations/open_flamingo, branch reduce-scope-mllm.",
                file_okay=False,
            ),
        ] = None,
        out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.", show_default=False)] = RESULTS,
        threads: Annotated[int, typer.Option(metavar="N", min=1, help="Let torch use N threads.")] = 1,
        device: Annotated[str, typer.Option(help="Device that runs the models: cpu or cuda.")] = "cpu",
        dtype: Annotated[DtypeName, typer.Option(help="Dtype of the weights.")] = "float32",
        quick: Annotated[bool, typer.Option("--quick", help="Try the script: tiny models and two pairs.")] = False,
    ) -> None:
        sizes = tuple(name for name in SIZES if name not in ("tiny", "7b")) if size == "all" else (size,)
        main(
            Settings(
                sizes=("tiny",) if quick else sizes,
                pairs=2 if quick else pairs,
                open_flamingo=open_flamingo,
                out=out,
                threads=threads,
                device=device,
                dtype=dtype,
            )
        )

    with_flags.__doc__ = asks
    return with_flags


def _name(sizes: tuple[str, ...]) -> str:
    return sizes[0] if len(sizes) == 1 else "all"


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is fetched, and other libraries' advice is not told."""
    from transformers.utils import logging as transformers_logging

    kept: dict[str, Any] = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE")}
    verbosity, level = transformers_logging.get_verbosity(), logging.root.manager.disable
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
        logging.disable(level)
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
