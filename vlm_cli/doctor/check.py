"""Register a check: a function that measures one thing that must hold for every composition.

    @check(
        "cached",
        "Decoding with a cache gives the logits of the full pass",
        "decoding with a cache = full pass",
        quick=True,
    )
    def cached(subject: Subject) -> Measured: ...

Each check measures a twin beside its comparison: the same comparison after a change that it must notice. A check that
cannot fail proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vlm_cli.doctor.finding import Decided, Measured
from vlm_cli.doctor.subject import BareLanguageModel, Subject, WholeModel
from vlm_cli.modeling.vlm import VLM

__all__ = ["CHECKS", "Check", "check", "check_whole"]

Result = Measured | Decided
OfSubject = TypeVar("OfSubject", bound=Callable[[Subject], Result])
OfWholeModel = TypeVar("OfWholeModel", bound=Callable[[WholeModel], Result])


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what users and tables call it.
        proves: what you know about a model that passes.
        claim: the same in at most 42 characters.
        measure: does the work on the whole model.
        measure_bare: does the same work on the bare language model; None if the question makes no sense for it.
        quick: whether a few forward passes over a short prompt are enough for it.
        exact: whether the check allows no difference at all.
        proves_in_stream: what it proves if vision tokens stand among the text tokens; "" for the same.
        claim_in_stream: the claim in that case.
    """

    name: str
    proves: str
    claim: str
    measure: Callable[[WholeModel], Result]
    measure_bare: Callable[[BareLanguageModel], Result] | None = None
    quick: bool = False
    exact: bool = False
    proves_in_stream: str = ""
    claim_in_stream: str = ""

    def proves_for(self, model: VLM) -> str:
        """Return what the check proves about this model's fusion."""
        return self.proves_in_stream if model.splices_media and self.proves_in_stream else self.proves

    def claim_for(self, model: VLM) -> str:
        """Return the claim about this model's fusion."""
        return self.claim_in_stream if model.splices_media and self.claim_in_stream else self.claim


#: Name -> check, in the order in which doctor runs them.
CHECKS: dict[str, Check] = {}


def check(
    name: str,
    proves: str,
    claim: str,
    *,
    quick: bool = False,
    proves_in_stream: str = "",
    claim_in_stream: str = "",
) -> Callable[[OfSubject], OfSubject]:
    """Register a check that also makes sense for the bare language model."""

    def register(measure: OfSubject) -> OfSubject:
        CHECKS[name] = Check(
            name,
            proves,
            claim,
            measure,
            measure,
            quick=quick,
            proves_in_stream=proves_in_stream,
            claim_in_stream=claim_in_stream,
        )
        return measure

    return register


def check_whole(
    name: str, proves: str, claim: str, *, quick: bool = False, exact: bool = False
) -> Callable[[OfWholeModel], OfWholeModel]:
    """Register a check that only the whole model can answer."""

    def register(measure: OfWholeModel) -> OfWholeModel:
        CHECKS[name] = Check(name, proves, claim, measure, quick=quick, exact=exact)
        return measure

    return register
