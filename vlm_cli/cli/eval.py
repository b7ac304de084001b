"""`vlm eval`: questions with known answers, and how well one or several models answer them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.eval_options import MarkingOptions, OutputOptions, QuestionOptions
from vlm_cli.cli.loading import LoadedModel, ModelRequest, keep_collecting
from vlm_cli.cli.options import JsonOption, PlacementOptions, QuietOption, SourceOptions, flatten_options
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.sampling import SamplingOptions, cut_note
from vlm_cli.errors import UsageError
from vlm_cli.models import DEMO
from vlm_cli.printable import count_of
from vlm_cli.writing.choice import TemplateChoice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_cli.cli.eval_report import Report
    from vlm_cli.data.records import Records
    from vlm_cli.evaluation.items import Item
    from vlm_cli.evaluation.metrics import Metric
    from vlm_cli.evaluation.run import Evaluation
    from vlm_cli.generation.plan import GenerationPlan

__all__ = ["evaluate"]


@flatten_options
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help=f"Directories that `vlm build` wrote, or hub ids. [default: {DEMO.name}]",
            autocompletion=complete_models,
            show_default=False,
        ),
    ] = None,
    questions: QuestionOptions = QuestionOptions(),
    marking: MarkingOptions = MarkingOptions(),
    files: OutputOptions = OutputOptions(),
    devices: PlacementOptions = PlacementOptions(),
    source: SourceOptions = SourceOptions(),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a model questions and mark its answers. The records hold the right answers, and a kind for each question.

    A record is a line such as {"kind": "count", "prompt": "<image:cat.jpg>Q: How many cats? A:", "completion": " One."}

    The model takes the most likely token each time, until a stop token. The table shows each figure of the metric with
    its 95 % confidence interval. Unless the data or --metric say otherwise, an answer is right if it equals the
    completion exactly, apart from whitespace at both ends. Of several models, each is compared with the first one.

    Example: vlm eval my-flamingo --data questions.jsonl --html answers.html
    """
    names = models or [DEMO.name]
    if questions.data is None:
        raise UsageError(f"no questions are given: vlm eval {' '.join(names)} --data FILE.jsonl")
    if files.prints and as_json:
        raise UsageError(f"{files.prints} - and --json both write to stdout. Leave one of them out.")
    if twice := next((x for x in names if names.count(x) > 1), None):
        raise UsageError(f"the model {twice!r} is given twice. Compare it with another one.")
    requests = [ModelRequest.of(name, devices, source, max_tiles=questions.max_tiles) for name in names]
    with files.reserved(questions.data):
        report = _make_report(requests, questions, marking)
        try:
            report.write(files)
        finally:  # the scores are printed even if the disk is full
            report.print(as_json, to_stderr=files.prints is not None)
    report.check_failed()


def _make_report(requests: Sequence[ModelRequest], questions: QuestionOptions, marking: MarkingOptions) -> Report:
    """Read the questions, and put them to one model after the other."""
    from vlm_cli.cli.eval_report import ModelRun, Report
    from vlm_cli.evaluation.controls import control_items, parse_control
    from vlm_cli.evaluation.items import read_items
    from vlm_cli.evaluation.metrics import parse_metrics

    assert questions.data is not None
    wanted = None if marking.metric is None else parse_metrics(marking.metric)
    control = None if marking.control is None else parse_control(marking.control)
    items, records = read_items(questions.data, questions.limit, questions.reading)
    console.note(f"{count_of(len(items), 'item')} from {questions.data}")
    for note in records.notes:
        console.note(note)
    metrics = _choose_metrics(wanted, items)
    if control is not None:
        control_items(items, control, records.loader())
    runs: list[ModelRun] = []
    for request in requests:
        loaded = request.load()
        asked = [item.copy() for item in items]
        found = _evaluate(loaded, questions, asked, records, metrics)
        runs.append(ModelRun(request.name, loaded.device, loaded.dtype, found))
        del loaded  # before the next model takes memory
    return Report(runs, questions, control, records, metrics)


def _choose_metrics(wanted: list[Metric] | None, items: Sequence[Item]) -> list[Metric]:
    """Return the metrics that the user named, or the one that fits the data, which is told."""
    from vlm_cli.evaluation.answers import make_sample
    from vlm_cli.evaluation.metrics import check_metrics, find_default

    samples = [make_sample(item) for item in items]
    metrics = wanted
    if metrics is None:
        metric, reason = find_default(samples, [item.record.marking.metric for item in items])
        console.note(f"Metric: {metric.name}, {reason}")
        metrics = [metric]
    check_metrics(metrics, samples)
    return metrics


def _evaluate(
    loaded: LoadedModel,
    questions: QuestionOptions,
    items: list[Item],
    records: Records,
    metrics: Sequence[Metric],
) -> Evaluation:
    """Answer the items with the engine of `vlm batch`."""
    from vlm_cli.evaluation.items import encode_items
    from vlm_cli.evaluation.run import evaluate_items
    from vlm_cli.generation.answers import RowAnswerer
    from vlm_cli.generation.batch_size import BatchSize

    plan = _make_plan(loaded, questions)
    encode_items(items, records, plan)
    if any(item.media for item in items):
        console.note(f"Images: {loaded.processor.image_processor.describe()}")
    keep_collecting()
    with ProgressLine(len(items)) as progress:
        answerer = RowAnswerer(plan, BatchSize(questions.batch_size), notify=progress.notify)
        found = evaluate_items(
            answerer, items, records.loader(), metrics, name=str(questions.data), report=progress.show
        )
    for note in answerer.picture_notes.lines():
        console.note(note)
    if found.num_cut:
        most = questions.max_new_tokens
        console.note(cut_note(found.num_cut, len(items), most, most))
    return found


def _make_plan(loaded: LoadedModel, questions: QuestionOptions) -> GenerationPlan:
    """Return how the model answers: the likeliest token each time."""
    from vlm_cli.generation.plan import GenerationPlan

    keywords = SamplingOptions(max_new_tokens=questions.max_new_tokens).keywords()
    writer = loaded.writer(
        TemplateChoice.parse(questions.chat_template), special_tokens=questions.special_tokens, system=questions.system
    )
    return GenerationPlan(loaded.model, loaded.processor, keywords, writer=writer)
