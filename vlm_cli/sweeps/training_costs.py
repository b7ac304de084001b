"""How many floating-point operations a composition takes to learn a record, counted on the shapes of some records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vlm_cli.costs.steps import count_step_flops
from vlm_cli.costs.workload import Workload
from vlm_cli.data.records import Record, Records, read_records
from vlm_cli.errors import LanguageModelError, LanguageModelLimit, UsageError, VLMError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import load_meta_model
from vlm_cli.processor import VLMProcessor
from vlm_cli.sweeps.budget import Budget
from vlm_cli.sweeps.candidates import Candidate, mark_impossible
from vlm_cli.sweeps.overview import Overview
from vlm_cli.sweeps.plan import Plan
from vlm_cli.training.planned import plan_step
from vlm_cli.training.preparing import RecordPreparer
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.writing.choice import TemplateChoice
from vlm_cli.writing.writer import PromptWriter

__all__ = ["count_record_flops", "read_samples", "steps_within", "with_training_costs"]

MOST_SAMPLES = 16  # records of a source whose shapes are looked at


def read_samples(plan: Plan) -> list[tuple[Records, float]]:
    """Read the sources of a sweep, each with the share of the records that come from it.

    Raises:
        VLMError: if one cannot be read.
    """
    read = [read_records(Path(x.data), x.refine(plan.reading)) for x in plan.mixture.ingredients]
    total = sum(len(x.good) for x in read)
    shares = plan.mixture.weights or [len(x.good) / total for x in read]
    return list(zip(read, shares, strict=True))


def count_record_flops(
    candidate: Candidate, samples: Sequence[tuple[Records, float]], *, trusts: bool = False
) -> float:
    """Return the operations of the forward and the backward pass of a record, on average over some records.

    Args:
        candidate: the composition, and what of it trains.
        samples: sources, each with its share.
        trusts: whether the language model's own code may run.

    Raises:
        VLMError: if a record cannot be learned, or the operations cannot be counted without weights.
    """
    assert candidate.composition is not None
    settings = candidate.settings
    model, _, processor = load_meta_model(candidate.composition, trust_remote_code=trusts)
    if processor is None:
        raise LanguageModelError("the language model has no tokenizer, so that nobody knows how long a record is.")
    preparer = _make_preparer(model, processor, settings)
    plan_step(model, settings, candidate.label)
    known: dict[tuple[Workload, int], int] = {}
    mean = 0.0
    for records, share in samples:
        found: Counter[tuple[Workload, int]] = Counter()
        step = -(-len(records.good) // MOST_SAMPLES)
        chosen = records.good[::step]
        for record in chosen:
            found.update(_shapes(preparer, record, records))
        for shape in found:
            if shape not in known:
                known[shape] = count_step_flops(model, shape[0], learned=shape[1])
        mean += share * sum(known[shape] * times for shape, times in found.items()) / len(chosen)
    return mean


def with_training_costs(overviews: Sequence[Overview], plan: Plan, *, trusts: bool = False) -> list[Overview]:
    """Count what a record costs each composition, and give each the steps that a budget of operations allows.

    A composition that cannot learn the records gets the reason as its problem.

    Raises:
        VLMError: if the records cannot be read, or a budget of operations cannot be turned into steps.
    """
    samples = read_samples(plan)
    known: dict[int, float] = {}
    budget = plan.budget if plan.budget is not None and plan.budget.unit == "flops" else None
    found = []
    for x in overviews:
        candidate = x.candidate
        if candidate.problem is None:
            number = candidate.same_as or candidate.number
            try:
                if number not in known:
                    known[number] = count_record_flops(candidate, samples, trusts=trusts)
                x = replace(x, flops_per_record=known[number])
            except LanguageModelLimit:  # it may be trained, but nobody knows how many operations that is
                if budget is not None:
                    raise
            except VLMError as error:
                x = replace(x, candidate=mark_impossible(candidate, error))
        if budget is not None and x.flops_per_record is not None:
            steps = steps_within(budget, x.flops_per_record, candidate.settings)
            x = replace(x, candidate=replace(candidate, settings=replace(candidate.settings, max_steps=steps)))
        found.append(x)
    return found


def steps_within(budget: Budget, flops_per_record: float, settings: TrainingSettings) -> int:
    """Return how many steps a budget of operations allows; at least one.

    Raises:
        UsageError: if nobody knows how many records a step has.
    """
    if settings.pack is not None:
        raise UsageError("with --pack, nobody knows how many records a step has. Give --budget steps or time.")
    return max(1, int(budget.amount / (flops_per_record * settings.step_size(1))))


def _make_preparer(model: VLM, processor: VLMProcessor, settings: TrainingSettings) -> RecordPreparer:
    choice = TemplateChoice.parse(settings.chat_template)
    writer = PromptWriter(processor, choice, parse_special_tokens=settings.special_tokens)
    return RecordPreparer(model, processor, writer, settings.too_long)


def _shapes(preparer: RecordPreparer, record: Record, records: Records) -> Iterator[tuple[Workload, int]]:
    """Yield the sizes of the sequences that a record becomes, and how many of their tokens are learned.

    All media of a sequence count as its first one.
    """
    loader = records.loader()
    images = preparer.processor.image_processor
    for sequence in preparer.prepare(record, loader):
        media = sequence.media
        text, how = max(1, len(sequence.ids) - len(media)), {}
        if media and media[0].kind == "video":
            how = {"frames": loader.count_frames(media[0].source)}
        size = loader.measure(media[0].source) if media and images.cuts and not how else None
        yield Workload(len(media), text, size, **how), int(sequence.is_target.sum())
