"""`vlm sweep`: what each composition of a grid costs, and how well it answers after the same training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.completion import complete_subjects
from vlm_cli.cli.options import JsonOption, QuietOption, flatten_options
from vlm_cli.cli.sweep_options import (
    CsvOption,
    MarkdownOption,
    PlanOptions,
    RunningOptions,
    TrustOption,
    make_plan,
)
from vlm_cli.errors import DataError, UsageError
from vlm_cli.interrupt import at_signal
from vlm_cli.locks import locked
from vlm_cli.sweeps.candidates import make_candidates
from vlm_cli.training.settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_cli.cli.sweep_process import Launcher
    from vlm_cli.sweeps.overview import Overview
    from vlm_cli.sweeps.plan import Plan
    from vlm_cli.sweeps.tables import Table

__all__ = ["sweep"]


@flatten_options
def sweep(
    *,
    context: typer.Context,
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE",
            help="A family or a composition file, which all compositions begin with; or the file of a sweep (YAML), "
            "whose keys are these options.",
            show_default=False,
            autocompletion=complete_subjects,
        ),
    ] = None,
    options: PlanOptions = PlanOptions(),
    running: RunningOptions = RunningOptions(),
    settings: TrainingSettings,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Compare compositions: what each one is and costs, and how well it answers after the same training.

    Without --data, the table shows what each composition costs; no weight is downloaded. A composition whose values do
    not fit each other stands in the table with the reason. With --data, --eval-data, --budget and --output, vlm trains
    each composition with each seed, asks it the questions, and compares it with the base.

    Example: vlm sweep base.yaml --set vision_tokenizer=linear,perceiver --set fusion=language-stream,cross-attention
    """
    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown exclude each other. Choose one.")
    plan = make_plan(context, base, options, settings)
    if plan.trains and running.output is None:
        raise UsageError("--data trains models, and no folder is named for them. Add --output OUT.")
    if not plan.trains and running.output is not None:
        raise UsageError("--output holds what training gives, and no records are given. Add --data SOURCE.")
    if not plan.trains and (needless := next((x for x in ("budget", "eval_data") if x in plan.values), None)):
        raise UsageError(
            f"--{needless.replace('_', '-')} is of a training, and no records are given. Add --data SOURCE."
        )
    candidates = make_candidates(plan.base, plan.dimensions, plan.settings)
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.sweeps.overview import look_at
    from vlm_cli.sweeps.tables import overview_table

    silence_libraries()
    rows = list(look_at(candidates, trust_remote_code=trust_remote_code))
    if plan.trains:
        shape = "json" if as_json else "csv" if as_csv else "markdown" if as_markdown else "table"
        _conduct(plan, rows, running, shape, trusts=trust_remote_code)
    elif as_json:
        console.print_json({"base": plan.base.name, "compositions": [row.to_dict() for row in rows]})
    else:
        _print_table(overview_table(rows), as_csv=as_csv, as_markdown=as_markdown)


def _conduct(plan: Plan, rows: Sequence[Overview], running: RunningOptions, shape: str, *, trusts: bool) -> None:
    """Train, ask and compare.

    Raises:
        DataError: if a run failed, after the table is printed.
    """
    from vlm_cli.cli.sweep_process import end_processes
    from vlm_cli.sweeps.conducting import Conductor, check_place, describe_problems
    from vlm_cli.sweeps.running import Engine
    from vlm_cli.sweeps.tables import overview_table, results_table

    out = running.output
    assert out is not None
    engine = Engine(running.engine, running.jobs, running.job_cpus, running.job_gpus)

    def end() -> str:
        end_processes()
        return f"{out} keeps what is done; the same command goes on."

    check_place(out)
    with locked(out):
        conductor = Conductor.prepare(plan, rows, out, console.note, trusts=trusts, overwrite=running.overwrite)
        for note in overview_table(rows).notes:
            console.note(note)
        with at_signal(end):
            results, problems = conductor.conduct(engine, make_launcher(running.jobs))
    if shape == "json":
        console.print_json(results.to_dict())
    else:
        _print_table(results_table(results), as_csv=shape == "csv", as_markdown=shape == "markdown")
    console.notify(f"Wrote {out / 'results.html'}, .md, .csv and .json")
    if problems:
        raise DataError(f"{describe_problems(problems, conductor.runs)}\nThe same command tries them again.")


def make_launcher(jobs: int) -> Launcher:
    """Make what runs the commands of a sweep; several at once share the cores, unless the user has divided them."""
    from vlm_cli.cli.sweep_process import Launcher

    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return Launcher()
    return Launcher({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))})


def _print_table(table: Table, *, as_csv: bool, as_markdown: bool) -> None:
    if as_csv:
        console.print_lines(table.to_csv())
    elif as_markdown:
        console.print_lines(table.to_markdown())
    else:
        console.print_table(table.short_heads, table.short_rows, optional=table.optional)
        for note in table.notes:
            console.print_line(note)
