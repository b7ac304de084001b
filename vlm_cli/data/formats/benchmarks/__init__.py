"""The rows of published benchmarks, in the form in which they are published; `docs/evaluation.md` lists them."""

from __future__ import annotations

from vlm_cli.data.formats.benchmarks.benchmark import Benchmark
from vlm_cli.data.formats.benchmarks.captions import COCOCaptions
from vlm_cli.data.formats.benchmarks.multiple_choice import MMMU, MMBench, MMStar, ScienceQA
from vlm_cli.data.formats.benchmarks.short_answers import GQA, VQAV2, ChartQA, DocVQA, TextVQA
from vlm_cli.data.formats.benchmarks.yes_no import MME, POPE

__all__ = ["BENCHMARKS", "Benchmark"]

BENCHMARKS: tuple[Benchmark, ...] = (
    VQAV2(),
    TextVQA(),
    GQA(),
    ScienceQA(),
    POPE(),
    MME(),
    MMBench(),
    MMMU(),
    MMStar(),
    DocVQA(),
    ChartQA(),
    COCOCaptions(),
)
