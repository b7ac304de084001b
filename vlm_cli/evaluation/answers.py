"""`GradedAnswer`: what a model answered to an item, and the marks that metrics give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_cli.evaluation.metrics import Sample
from vlm_cli.prompt import format

if TYPE_CHECKING:
    from vlm_cli.evaluation.items import Item

__all__ = ["GradedAnswer", "make_sample"]


@dataclass(frozen=True)
class GradedAnswer:
    """What a model answered to an item.

    Attributes:
        item: the question.
        text: the answer; of a metric that rates choices, the one that it finds best.
        has_ended: whether a stop token ended the answer, and not its length.
        likelihoods: of each choice its log-probability and number of tokens; empty where no metric asks for them.
        marks: the mark of each metric, the first metric's first.
    """

    item: Item
    text: str
    has_ended: bool
    likelihoods: tuple[tuple[float, int], ...] = ()
    marks: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether the answer has the full mark of the first metric."""
        return next(iter(self.marks.values()), 0.0) >= 1

    def to_dict(self) -> dict[str, Any]:
        """Return a line of the file of answers."""
        sample = make_sample(self.item)
        several = {"accepted": list(sample.accepted)} if len(sample.accepted) > 1 else {}
        choices = {"choices": list(sample.choices)} if sample.choices else {}
        rated = {"likelihoods": [x for x, _ in self.likelihoods]} if self.likelihoods else {}
        return {
            "id": self.item.id,
            "kind": self.item.kind,
            "prompt": format(self.item.asked),
            "expected": self.item.expected,
            **several,
            **choices,
            "answer": self.text,
            **rated,
            "scores": dict(self.marks),
        }


def make_sample(item: Item, answer: str = "", likelihoods: Sequence[tuple[float, int]] = ()) -> Sample:
    """Return what a metric sees of an item and its answer."""
    marking = item.record.marking
    answers = marking.answers
    if not any(x.strip() == item.expected.strip() for x in answers):
        answers = (item.expected, *answers)
    return Sample(
        answer=answer,
        expected=item.expected,
        accepted=answers,
        choices=marking.choices,
        group=marking.group,
        likelihoods=tuple(likelihoods),
        place=item.record.place if item.record.shard else item.id,
    )
