"""The options of `vlm sweep`, and how they become a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_settings
from vlm_cli.cli.eval_options import MARKING, MAX_RECORDS
from vlm_cli.cli.options import OUTPUT, ColumnsOption, ImageFolderOption, MaxPixelsOption, MediaRootOption
from vlm_cli.cli.sampling import MAX_NEW_TOKENS
from vlm_cli.cli.training_options import DataOption, WeightsOption
from vlm_cli.errors import UsageError
from vlm_cli.flags import list_settings
from vlm_cli.sweeps.dimensions import make_grid, parse_dimension
from vlm_cli.sweeps.files import is_sweep_file, read_plan_values
from vlm_cli.sweeps.plan import Plan
from vlm_cli.training.data_settings import DATA
from vlm_cli.training.settings import LENGTH, TrainingSettings

__all__ = ["CsvOption", "MarkdownOption", "PlanOptions", "RunningOptions", "TrustOption", "make_plan"]

GRID, RUNS = "Compositions", "Runs"  # headings in --help

TrustOption = Annotated[
    bool, option(GRID, "Run Python code that comes with the language models.", "--trust-remote-code")
]
CsvOption = Annotated[bool, option(OUTPUT, "Print the table as comma-separated values.", "--csv")]
MarkdownOption = Annotated[bool, option(OUTPUT, "Print the table in Markdown.", "--markdown")]


@dataclass(frozen=True)
class PlanOptions:
    """What a sweep compares, learns and asks; a file of a sweep has the same keys."""

    set: Annotated[
        list[str] | None,
        option(
            GRID,
            "Give a setting of the composition each of these values in turn, such as vision_tokenizer=linear,perceiver "
            "or fusion.every=1,2; train.NAME is a setting of `vlm train`. One value holds everywhere. Several --set "
            "make a grid. A value is YAML: {type: perceiver, num_latents: 16}.",
            metavar="NAME=VALUE,…",
            autocompletion=complete_settings,
        ),
    ] = None
    seeds: Annotated[
        str | None,
        option(
            GRID,
            "Train each composition once with each seed, of its random weights and of the order of the records. The "
            "default is 0.",
            metavar="N,…",
        ),
    ] = None
    data: DataOption = None
    weights: WeightsOption = None
    eval_data: Annotated[
        str | None,
        option(
            DATA, "Ask each trained model the questions of SOURCE, and mark the answers as `vlm eval` does.",
            metavar="SOURCE",
        ),
    ] = None  # fmt: skip
    columns: ColumnsOption = None
    image_folder: ImageFolderOption = None
    media_root: MediaRootOption = None
    max_pixels: MaxPixelsOption = None
    budget: Annotated[
        str | None,
        option(
            LENGTH,
            "Let each run train for a time (90s, 10m, 2h), a number of steps (500), or a number of floating-point "
            "operations (2e15FLOPs).",
            metavar="TIME|STEPS|FLOPs",
        ),
    ] = None
    metric: Annotated[
        str | None,
        option(MARKING, "Mark the answers by NAME, as `vlm eval` does; several with commas between.", metavar="NAME"),
    ] = None
    limit: Annotated[
        int | None, option(MARKING, "Ask only the first N records.", min=1, max=MAX_RECORDS, metavar="N")
    ] = None
    max_new_tokens: Annotated[
        int | None,
        option(
            MARKING,
            "Cut an answer after N new tokens; the default is that of `vlm eval`.",
            min=1,
            max=MAX_NEW_TOKENS,
            metavar="N",
        ),
    ] = None


@dataclass(frozen=True)
class RunningOptions:
    """Where results go, and how runs are performed."""

    output: Annotated[
        Path | None,
        option(
            OUTPUT,
            "Write the results to the folder OUT, with a folder for each run. The same command goes on where it was "
            "ended.",
            "--output",
            "-o",
            metavar="OUT",
        ),
    ] = None
    overwrite: Annotated[bool, option(OUTPUT, "Begin again: remove what a sweep wrote to OUT.", "--overwrite")] = False
    jobs: Annotated[int, option(RUNS, "Perform N runs at once.", min=1, max=1_000, metavar="N")] = 1
    engine: Annotated[
        str,
        option(
            RUNS,
            "local performs runs in processes of this machine; ray on the Ray cluster that RAY_ADDRESS names, whose "
            "machines see the same files.",
            metavar="local|ray",
        ),
    ] = "local"
    job_cpus: Annotated[float, option(RUNS, "Cores that Ray reserves for a run.", min=0.0, max=1_000.0)] = 1.0
    job_gpus: Annotated[float, option(RUNS, "GPUs that Ray reserves for a run.", min=0.0, max=100.0)] = 0.0


def make_plan(context: typer.Context, base: str | None, options: PlanOptions, settings: TrainingSettings) -> Plan:
    """Make a plan of what stands on the command line, over the file of a sweep if BASE is one.

    Raises:
        UsageError: if no sweep can be made of it.
    """
    if _is_given(context, "seed"):
        raise UsageError("--seed is one seed for all runs, and a sweep may have several. Give --seeds N,N.")
    if base is not None and is_sweep_file(base):
        values, place = read_plan_values(base), f"the sweep {base!r}"
    else:
        values, place = ({} if base is None else {"base": base}), "the sweep"
    if options.set:
        dimensions = [parse_dimension(text) for text in options.set]
        make_grid(dimensions)  # refuses a name that stands there twice
        known = {str(name).replace("-", "_"): x for name, x in (values.get("set") or {}).items()}
        values["set"] = {**known, **{x.name: list(x.values) for x in dimensions}}
    if options.seeds is not None:
        values["seeds"] = _read_seeds(options.seeds)
    for name in ("data", "weights", "eval_data", "columns", "budget", "metric", "limit", "max_new_tokens"):
        if (value := getattr(options, name)) is not None:
            values[name] = list(value) if isinstance(value, tuple) else value
    for name in ("image_folder", "media_root", "max_pixels"):
        if (value := getattr(options, name)) is not None:
            values[name] = value if isinstance(value, int) else str(value)
    for setting in list_settings(TrainingSettings):
        if _is_given(context, setting.name):
            value = getattr(settings, setting.name)
            values[setting.name] = list(value) if isinstance(value, tuple) else value
    return Plan(values, place)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read_seeds(text: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds expects whole numbers with commas between, such as 0,1, got {text!r}.") from None
