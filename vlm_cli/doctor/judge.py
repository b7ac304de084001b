"""The verdict on a comparison, and who is to blame: the composition or its language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from vlm_cli.doctor.check import Check, Result
from vlm_cli.doctor.finding import Decided, Finding, Measured
from vlm_cli.doctor.subject import BareLanguageModel, WholeModel
from vlm_cli.errors import LanguageModelLimit, first_line

__all__ = ["judge"]

_MEDIA_FACTOR = 16  # media enlarge the language model's own rounding; up to this factor it is to blame

Examined = TypeVar("Examined", WholeModel, BareLanguageModel)


def judge(check: Check, subject: WholeModel, bare: Sequence[BareLanguageModel]) -> Finding:
    """Run a check and return its finding.

    Args:
        check: what to measure.
        subject: the model under examination.
        bare: its bare language model, once per seed; the judge takes the worst of them.
    """
    finding = Finding(check.name, check.proves_for(subject.model), "fails", difference=math.inf)
    result, error = _attempt(check.measure, subject)
    if isinstance(result, Decided):
        return replace(
            finding, verdict=result.verdict, difference=result.difference, allowed=result.allowed, note=result.note
        )
    if result is None:
        finding = replace(finding, note=error)
    else:
        dtype = subject.model.dtype
        allowed = 0.0 if check.exact else _rounding(result.scale, dtype)
        finding = replace(finding, difference=result.difference, allowed=allowed, twin=result.twin)
        if result.difference <= allowed:
            # Coarse numbers allow a wide difference; a change must still stand out from the difference.
            if result.twin > max(2 * result.difference, torch.finfo(dtype).eps * result.scale):
                return replace(finding, verdict="holds")
            return replace(finding, note="a change that must be seen was not: this check saw nothing")
        if not math.isfinite(result.difference):
            finding = replace(finding, note="logits or features are no numbers (NaN), or infinite")
    if check.measure_bare is None:
        return finding
    return _blame(finding, check.measure_bare, bare)


def _blame(
    finding: Finding, measure: Callable[[BareLanguageModel], Result], bare: Sequence[BareLanguageModel]
) -> Finding:
    """Turn a failure into a limit if the bare language model fails in the same way.

    Examples:
        - Whole model: "ValueError: …"; bare: "ValueError: …" -> limit.
        - Whole model: difference 0.3; bare: difference 0.1, and rounding explains 0.01 -> limit.
        - Whole model: difference 0.3; bare: no difference -> the composition fails.
    """
    refused = finding.note.startswith(LanguageModelLimit.__name__)  # `VLM` refused, and gave the reason
    worst, error = _worst(measure, bare)
    if worst is None:
        if refused or error.partition(":")[0] == finding.note.partition(":")[0]:
            return replace(finding, verdict="limit", note=f"the bare language model: {error}")
        return replace(finding, note=f"{finding.note}. The bare language model: {error}".strip(". "))
    assert finding.difference is not None
    # A NaN of the bare language model comes from broken weights; that is no limit of its type.
    half = _rounding(worst.scale, bare[0].model.dtype) / 2
    if half < worst.difference < math.inf and (refused or finding.difference <= _MEDIA_FACTOR * worst.difference):
        reason = f"the bare language model differs by {worst.difference:.1e} in the same comparison"
        return replace(finding, verdict="limit", note=f"{reason}. {finding.note}".strip(". "))
    return finding


def _worst(
    measure: Callable[[BareLanguageModel], Result], bare: Sequence[BareLanguageModel]
) -> tuple[Measured | None, str]:
    """Return the largest difference of several prompts; None and the error if any prompt raises."""
    found: list[Measured] = []
    for subject in bare:
        result, error = _attempt(measure, subject)
        if result is None:
            return None, error
        assert isinstance(result, Measured)
        found.append(result)
    return max(found, key=lambda x: x.difference), ""


def _attempt(measure: Callable[[Examined], Result], subject: Examined) -> tuple[Result | None, str]:
    """Measure; return None and the error if anything raises, since any error of a language model is a finding."""
    try:
        return measure(subject), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(error)}"


def _rounding(scale: float, dtype: torch.dtype) -> float:
    """Return the largest difference that rounding explains: sums in another order, layer after layer."""
    finfo = torch.finfo(dtype)
    return (256 if finfo.bits == 32 else 8) * finfo.eps * max(scale, 1.0)
