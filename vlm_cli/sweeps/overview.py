"""What each composition of a sweep is and costs, from shapes alone: no weight is downloaded or allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.costs.prompts import count_prompt
from vlm_cli.costs.workload import Workload
from vlm_cli.errors import LanguageModelLimit, VLMError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import load_meta_model
from vlm_cli.report.parameters import count_parameters
from vlm_cli.sweeps.candidates import Candidate, mark_impossible
from vlm_cli.tiling.texts import list_shapes

__all__ = ["PROMPT", "Costs", "Overview", "look_at"]

#: The prompt whose operations are counted: one picture, and so many tokens of text.
PROMPT = Workload(pictures=1, text=64)


@dataclass(frozen=True)
class Costs:
    """What a composition takes.

    Attributes:
        parameters: of the model.
        trainable: of these, those that train.
        tokens: vision tokens of a picture; of one in tiles, the least and the most.
        positions: of the language model that a picture takes; the least and the most.
        flops: floating-point operations from `PROMPT` to the first new token, with a picture of one view; None if the
            language model computes nothing without its weights.
    """

    parameters: int
    trainable: int
    tokens: tuple[int, int]
    positions: tuple[int, int]
    flops: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers; of two equal ones, one."""
        return {
            "parameters": self.parameters,
            "trainable": self.trainable,
            "tokens_per_image": _one_or_both(self.tokens),
            "positions_per_image": _one_or_both(self.positions),
            "flops_per_prompt": self.flops,
        }


@dataclass(frozen=True)
class Overview:
    """A candidate, and its costs if it is possible.

    Attributes:
        candidate: the composition, and how it trains.
        costs: None if it is impossible.
        flops_per_record: operations to learn a record; None if the sweep does not train, or they cannot be counted.
    """

    candidate: Candidate
    costs: Costs | None
    flops_per_record: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a row of the table says."""
        candidate = self.candidate
        return {
            "number": candidate.number,
            "values": dict(candidate.values),
            **({} if self.costs is None else self.costs.to_dict()),
            **({} if self.flops_per_record is None else {"flops_per_record": round(self.flops_per_record)}),
            **({} if candidate.problem is None else {"problem": candidate.problem}),
            **({} if candidate.same_as is None else {"same_as": candidate.same_as}),
        }


def look_at(candidates: Sequence[Candidate], *, trust_remote_code: bool = False) -> Iterator[Overview]:
    """Yield each candidate with its costs; one whose parts do not make a model gets the reason as its `problem`."""
    for candidate in candidates:
        if candidate.composition is None:
            yield Overview(candidate, None)
            continue
        try:
            yield Overview(candidate, count(candidate, trust_remote_code=trust_remote_code))
        except VLMError as error:
            yield Overview(mark_impossible(candidate, error), None)


def count(candidate: Candidate, *, trust_remote_code: bool = False) -> Costs:
    """Count what a candidate takes.

    Raises:
        VLMError: if its parts cannot be found or do not fit.
    """
    assert candidate.composition is not None
    model, _, _ = load_meta_model(candidate.composition, trust_remote_code=trust_remote_code)
    trained = candidate.settings.trainable
    if trained is not None:
        model.set_trainable(trained)
    report = count_parameters(model)
    shapes = list_shapes(candidate.composition.tiling, model.vision_encoder.image_size[::-1])
    tokens = [model.num_vision_tokens(size) for size in shapes]
    positions = [model.positions_of(size) for size in shapes]
    return Costs(
        report.total.parameters,
        report.total.trainable,
        (min(tokens), max(tokens)),
        (min(positions), max(positions)),
        _count_flops(model),
    )


def _count_flops(model: VLM) -> int | None:
    try:
        return count_prompt(model, PROMPT).flops.total
    except LanguageModelLimit:
        return None


def _one_or_both(numbers: tuple[int, int]) -> int | list[int]:
    least, most = numbers
    return least if least == most else [least, most]
