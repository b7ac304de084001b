"""`vlm cost`: what a composition costs, counted without a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.cost_crossing import Crossing, find_crossings, print_crossings
from vlm_cli.cli.cost_options import (
    MOST,
    TRAINING,
    AgainstOption,
    CrossingOption,
    CsvOption,
    PlotOption,
    WorkloadOptions,
)
from vlm_cli.cli.cost_tables import csv_text, print_tables
from vlm_cli.cli.loading import notify_of_random_tower
from vlm_cli.cli.options import (
    OUTPUT,
    ComposeOptions,
    JsonOption,
    ModelArgument,
    QuietOption,
    flatten_options,
    resolve_dtype,
)
from vlm_cli.composition import Composition
from vlm_cli.errors import UsageError
from vlm_cli.models import DEMO, load_meta_model, resolve
from vlm_cli.registry import FUSIONS
from vlm_cli.report.tables import human_bytes, human_flops
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.step_settings import StepSettings

if TYPE_CHECKING:
    from vlm_cli.costs.subjects import Cost, Subject
    from vlm_cli.costs.workload import Workload
    from vlm_cli.modeling.vlm import VLM

__all__ = ["cost"]


@flatten_options
def cost(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    workload: WorkloadOptions = WorkloadOptions(),
    against: AgainstOption = None,
    crossing: CrossingOption = False,
    train: Annotated[
        bool, option(TRAINING, "Count a step of training, too. The options below imply it.", "--train")
    ] = False,
    learned: Annotated[
        int | None,
        option(TRAINING, "Learn only the last N tokens of the text; the default is all.", metavar="N", min=1, max=MOST),
    ] = None,
    step: StepSettings = StepSettings(),
    card: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help="Estimate seconds on a card: h100, a100, 4090, l4, or cpu, which is this machine, measured now.",
        ),
    ] = None,
    plot: PlotOption = None,
    overwrite: Annotated[bool, option(OUTPUT, "Replace FILE, if it exists.", "--overwrite")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Count what a composition costs: operations, memory, and seconds on a card. No weight is downloaded or loaded.

    Example: vlm cost llava --language-model ./my-llama --pictures 1,8 --text 64,512 --against cross-attention
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other. Choose one.")
    if crossing and against is None:
        raise UsageError("--crossing compares two models. Add --against OTHER.")
    chosen = resolve(model, replace(compose.request, trainable=None))
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    workloads = workload.workloads()
    if plot is not None:
        _check_plot(plot, workloads, overwrite)
    subjects = _make_subjects(model, chosen, against, compose, resolve_dtype(workload.dtype), card)
    trainable = None if compose.trainable is None else tuple(compose.trainable.split(","))
    settings = TrainingSettings(trainable=trainable, **{f.name: getattr(step, f.name) for f in fields(step)})
    if train or learned is not None or trainable is not None or step != StepSettings():
        subjects = [_with_training(subject, settings, learned) for subject in subjects]
    with console.announced_steps(quiet) as announce:
        counted = [(subject, _count_all(subject, workloads, announce)) for subject in subjects]
        crossed = find_crossings(subjects, workloads, announce) if crossing else None
    for subject, costs in counted:
        _note_long(subject.name, costs)
    if plot is not None:
        from vlm_cli.costs.plot import draw_costs

        draw_costs(plot, counted, overwrite=overwrite)
        console.notify(f"Wrote {plot}.")
    if as_json:
        console.print_json(_to_dict(counted, crossed))
    elif as_csv:
        console.print_lines(csv_text(counted))
    else:
        print_tables(counted)
        _print_formula(subjects[0])
        if crossed is not None:
            print_crossings(crossed)


def _make_subjects(
    name: str | None,
    chosen: Composition | str,
    against: str | None,
    compose: ComposeOptions,
    dtype: Any,
    card: str | None,
) -> list[Subject]:
    """Make the models of shapes that are compared.

    Raises:
        VLMError: if one cannot be found or made, or there is no such card.
    """
    from vlm_cli.costs.cards import find_card
    from vlm_cli.costs.subjects import Subject, with_fusion

    found = None if card is None else find_card(card)

    def load(subject: Composition | str) -> VLM:
        vlm, stored, _ = load_meta_model(
            subject, trust_remote_code=compose.trust_remote_code, revision=compose.revision
        )
        notify_of_random_tower(subject)
        return vlm.to(stored if isinstance(dtype, str) else dtype).eval()

    first = load(chosen)
    models = {name or first.config.composition.family or (DEMO.name if chosen == str(DEMO) else "MODEL"): first}
    if against is not None:
        is_fusion = against in FUSIONS and not Path(against).exists()
        request = replace(compose.request, trainable=None, family=None)
        models[against] = with_fusion(first, against) if is_fusion else load(resolve(against, request))
        if len(models) == 1:
            raise UsageError(f"--against {against} is MODEL itself. Give another model, or a fusion's name.")
    return [Subject(name, x, card=found) for name, x in models.items()]


def _check_plot(path: Path, workloads: Sequence[Workload], overwrite: bool) -> None:
    """Refuse a plot without a curve, before anything is counted.

    Raises:
        VLMError: saying what to give.
    """
    from vlm_cli.report.plots import check_plot

    if len({x.text for x in workloads}) == len({x.pictures for x in workloads}) == 1:
        raise UsageError("--plot draws costs over several sizes. Give some: --text 64,256,1024 or --pictures 1,4,16.")
    check_plot(path, overwrite=overwrite)


def _with_training(subject: Subject, settings: TrainingSettings, learned: int | None) -> Subject:
    """Let a copy of a subject's model train.

    Raises:
        UsageError: if nothing would train.
    """
    from vlm_cli.training.planned import plan_step

    trained = copy.deepcopy(subject.model)
    states = plan_step(trained, settings, subject.name)
    return replace(subject, trained=trained, states=states, learned=learned, bf16=settings.bf16)


def _count_all(subject: Subject, workloads: Sequence[Workload], announce: Callable[[str], None]) -> list[Cost]:
    found = []
    for i, workload in enumerate(workloads, 1):
        announce(f"counting {subject.name}, {i} of {len(workloads)}")
        found.append(subject.count(workload))
    announce("")
    return found


def _note_long(name: str, costs: Sequence[Cost]) -> None:
    """Say which prompts are longer than the language model's context."""
    long = [x.prompt for x in costs if not x.prompt.fits]
    if long:
        most = max(x.positions for x in long)
        console.notify(
            f"Note: {len(long)} of {len(costs)} prompts of {name} do not fit its language model, which reads "
            f"{long[0].context:,} positions: the longest takes {most:,}. They are counted as if it did."
        )


def _to_dict(counted: Sequence[tuple[Subject, Sequence[Cost]]], crossed: Sequence[Crossing] | None) -> dict[str, Any]:
    card = counted[0][0].card
    found: dict[str, Any] = {
        "models": [
            {"name": subject.name, "dtype": subject.dtype, "costs": [x.to_dict() for x in costs]}
            for subject, costs in counted
        ]
    }
    if card is not None:
        limits = {f.name: getattr(card, f.name) for f in fields(card)}
        found["card"] = {**limits, "peak": dict(card.peak)}
    if crossed is not None:
        found["crossings"] = [
            {**asdict(x), "changes": [{"from_tokens": n, "cheaper": name} for n, name in x.changes]} for x in crossed
        ]
    return found


def _print_formula(subject: Subject) -> None:
    """Say how seconds were estimated."""
    card = subject.card
    if card is not None:
        join = "the larger of" if card.overlaps else "the sum of"
        console.print_lines(
            f"Each operation takes {join} FLOPs / ({card.share:g} · {human_flops(card.peak[subject.dtype])}/s)\n"
            f"and bytes / ({card.moved:.2g} · {human_bytes(card.bandwidth)}/s), and a run at least "
            f"{card.host * 1e6:.2g} µs for each:\n{card.source}.\n"
        )
