"""`Conductor`: a sweep from its plan to its results, from wherever an earlier call was ended.

OUT/sweep.yaml       the sweep, with versions and hashes: `vlm sweep OUT/sweep.yaml --output OTHER` repeats it
OUT/runs/            a folder for each run
OUT/results.json, results.csv, results.md, results.html    written anew after each run
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.errors import CheckpointError, OutputExistsError
from vlm_cli.evaluation.answers import make_sample
from vlm_cli.evaluation.items import read_items
from vlm_cli.evaluation.metrics import Metric, check_metrics, find_default, parse_metrics
from vlm_cli.files import replacing_files
from vlm_cli.printable import count_of
from vlm_cli.sweeps.candidates import Candidate, digest, find_reference
from vlm_cli.sweeps.files import dump_plan, read_plan_values
from vlm_cli.sweeps.inputs import changes_of, check_unchanged, hash_data, hash_parts, list_versions
from vlm_cli.sweeps.overview import Overview
from vlm_cli.sweeps.page import format_page
from vlm_cli.sweeps.performing import Launch
from vlm_cli.sweeps.plan import MADE, QUESTIONS, Plan
from vlm_cli.sweeps.results import Results, collect
from vlm_cli.sweeps.running import Engine, run_all
from vlm_cli.sweeps.runs import RUNS, Run, make_runs
from vlm_cli.sweeps.tables import results_table
from vlm_cli.sweeps.training_costs import with_training_costs

if TYPE_CHECKING:
    from vlm_cli.evaluation.items import Item

__all__ = ["Conductor", "check_place", "describe_problems"]

SWEEP_FILE = "sweep.yaml"
_RESULTS = ("results.json", "results.csv", "results.md", "results.html")
_MOST_TOLD = 10  # failed runs that a message names


@dataclass(frozen=True)
class Conductor:
    """A sweep that is ready to run.

    Attributes:
        plan: the sweep.
        overviews: its compositions.
        out: the folder of the results.
        runs: all of them.
        items: the questions.
        metrics: by which answers are marked.
        inputs: hashes of what the sweep reads.
        reference: the composition with which others are compared.
        note: told what the user should know.
    """

    plan: Plan
    overviews: Sequence[Overview]
    out: Path
    runs: Sequence[Run]
    items: Sequence[Item]
    metrics: Sequence[Metric]
    inputs: dict[str, str]
    reference: Candidate | None
    note: Callable[[str], None]

    @classmethod
    def prepare(
        cls,
        plan: Plan,
        overviews: Sequence[Overview],
        out: Path,
        note: Callable[[str], None],
        *,
        trusts: bool = False,
        overwrite: bool = False,
    ) -> Conductor:
        """Check what a sweep reads and where it writes.

        Args:
            plan: the sweep.
            overviews: its compositions.
            out: the folder of the results.
            note: told what the user should know.
            trusts: whether the language models' own code may run.
            overwrite: begin again: remove what an earlier sweep wrote to `out`.

        Raises:
            VLMError: if the data cannot be used or have changed, or `out` holds something else.
        """
        plan.check_training()
        items, records = read_items(Path(plan.eval_data), plan.values.get("limit"), plan.reading)
        metrics = _choose_metrics(plan, items, note)
        hashes = hash_data(plan)
        overviews = with_training_costs(overviews, plan, trusts=trusts)
        possible = [x.candidate for x in overviews if x.candidate.problem is None]
        if not possible:
            raise CheckpointError(f"no composition is possible: {overviews[0].candidate.problem}")
        parts = hash_parts([x.composition for x in possible if x.composition is not None])
        inputs = {**hashes, plan.eval_data: records.sha256, **parts}
        made = _check_folder(out, inputs, overwrite=overwrite) or plan.values.get(MADE) or {}
        asked = [records.sha256, *(plan.values.get(x) for x in QUESTIONS), [x.name for x in metrics]]
        runs = make_runs(plan, [x.candidate for x in overviews], out, hashes, digest(asked)[:8], trusts=trusts)
        reference = find_reference(plan.base, plan.dimensions, [x.candidate for x in overviews])
        for line in _compare_with(made, inputs):
            note(line)
        return cls(plan, overviews, out, runs, items, metrics, inputs, reference, note)

    def conduct(self, engine: Engine, launch: Launch) -> tuple[Results, dict[str, str]]:
        """Perform what is left of the runs.

        Returns:
            The results, and folder of a run that failed -> why.

        Raises:
            CheckpointError: if the disk is full.
        """
        problems: dict[str, str] = {}
        places = {run.folder.name: i for i, run in enumerate(self.runs, start=1)}
        left = [run for run in self.runs if not run.is_complete]
        if len(left) < len(self.runs):
            self.note(f"{count_of(len(self.runs) - len(left), 'run')} of {len(self.runs)} complete already.")
        self._write(self._results(problems))

        def tell(run: Run, words: str) -> None:
            self.note(f"[{places[run.folder.name]}/{len(self.runs)}] {run.name}: {words}")

        for run, outcome in run_all(left, engine, launch, lambda run: tell(run, f"begins; {run.log} has what it says")):
            if outcome.problem is not None:
                problems[run.folder.name] = outcome.problem
            results = self._results(problems)
            tell(run, outcome.problem or _say_score(results, run))
            if outcome.is_full:
                raise CheckpointError(
                    f"the disk of {str(self.out)!r} is full: {outcome.problem} Make room, then give the same command "
                    "again: it goes on where it stopped."
                )
            self._write(results)
        return self._results(problems), problems

    def _results(self, problems: dict[str, str]) -> Results:
        rows = collect(self.overviews, self.runs, problems, self.items, self.metrics, self.reference)
        plan = self.plan
        facts = {
            "base": plan.base.name,
            "data": ", ".join(plan.data),
            "questions": f"{count_of(len(self.items), 'item')} of {plan.eval_data}",
            "budget": "that of the settings" if plan.budget is None else plan.budget.text,
            "seeds": ", ".join(map(str, plan.seeds)),
            "versions": ", ".join(f"{name} {x}" for name, x in list_versions().items()),
        }
        return Results(rows, self.metrics, facts)

    def _write(self, results: Results) -> None:
        """Write the sweep's file and its results, all of them or none.

        Raises:
            CheckpointError: if the disk is full.
        """
        made = {"versions": list_versions(), "inputs": self.inputs}
        values = {**self.plan.values, "seeds": self.plan.seeds, MADE: made}
        table = results_table(results)
        texts = {
            SWEEP_FILE: dump_plan(values, self.out),
            _RESULTS[0]: json.dumps(results.to_dict(), indent=1, ensure_ascii=False, default=str) + "\n",
            _RESULTS[1]: table.to_csv(),
            _RESULTS[2]: table.to_markdown(),
            _RESULTS[3]: format_page(results),
        }
        try:
            (self.out / RUNS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.out)!r}: {error.strerror}.") from None
        with replacing_files([self.out / name for name in texts], overwrite=True) as files:
            for file, text in zip(files, texts.values(), strict=True):
                file.write(text)


def describe_problems(problems: dict[str, str], runs: Sequence[Run]) -> str:
    """Say which runs failed, and why."""
    names = {run.folder.name: run for run in runs}
    lines = [f"  {names[x].name}: {why}" for x, why in list(problems.items())[:_MOST_TOLD]]
    more = [f"  and {len(problems) - _MOST_TOLD} more"] if len(problems) > _MOST_TOLD else []
    return "\n".join([f"{len(problems)} of {count_of(len(runs), 'run')} failed:", *lines, *more])


def _choose_metrics(plan: Plan, items: Sequence[Item], note: Callable[[str], None]) -> list[Metric]:
    """Return the metrics that the user named, or the one that `vlm eval` chooses for the questions."""
    samples = [make_sample(item) for item in items]
    if (given := plan.values.get("metric")) is not None:
        metrics = parse_metrics(given)
    else:
        metric, reason = find_default(samples, [item.record.marking.metric for item in items])
        note(f"Metric: {metric.name}, {reason}")
        metrics = [metric]
    check_metrics(metrics, samples)
    return metrics


def check_place(out: Path) -> None:
    """Check that there is a folder for the results.

    Raises:
        CheckpointError: if there is none.
    """
    if not (folder := out.absolute().parent).is_dir():
        raise CheckpointError(f"cannot write {str(out)!r}: the folder {str(folder)!r} does not exist.")


def _check_folder(out: Path, inputs: dict[str, str], *, overwrite: bool) -> dict[str, Any]:
    """Check that results may be written to a folder, and return what a sweep noted there of its making.

    Raises:
        VLMError: if it holds something else, or runs of other inputs.
    """
    if not out.exists():
        return {}
    held = [x.name for x in out.iterdir() if not x.name.startswith(".")] if out.is_dir() else [out.name]
    if held in ([], [RUNS]):  # a sweep was killed before its file was whole
        return {}
    if not (out / SWEEP_FILE).is_file():
        raise OutputExistsError(f"{str(out)!r} exists, and no sweep wrote it. Choose another name.")
    if overwrite:
        for name in (RUNS, *_RESULTS, SWEEP_FILE):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return {}
    values = read_plan_values(str(out / SWEEP_FILE))
    check_unchanged(values, inputs, out)
    return values.get(MADE) or {}


def _compare_with(made: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    """Say what is another than when a sweep was made, or its first runs."""
    before = made.get("versions") or {}
    now = list_versions()
    changed = [name for name in now if name in before and before[name] != now[name]]
    lines = [f"{name} is {now[name]} here; the sweep was made with {before[name]}." for name in changed]
    return lines + [f"{name} is another than when the sweep was made." for name in changes_of(made, inputs)]


def _say_score(results: Results, run: Run) -> str:
    from vlm_cli.evaluation.figures import estimate_cells

    found = next(x for row in results.rows for x in row.seeds if x.run.folder == run.folder)
    if found.score is None:
        return "no answers"
    seconds = found.training.get("seconds")
    return f"{' '.join(estimate_cells(found.score.main)[:2])}{'' if seconds is None else f', trained {seconds:.0f} s'}"
