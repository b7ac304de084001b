"""Whether rounding explains that two ways to run a model in few bits write different tokens.

A twin of the model in float32, with the same weights, reads the same tokens. Where two answers part, its two logits
should be as near to each other as its logits and those of the plain way differ anywhere; and the other way should be no
farther from the twin than the plain way is. A fault in the other way breaks one of the two.

T tokens of an answer, V columns of the logits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parting", "find_parting", "write"]

MOST_ERROR = 1.5  # of the other way over that of the plain way, as root of mean squares


@dataclass(frozen=True)
class Parting:
    """Where two answers part, and what a twin in float32 says of it.

    Attributes:
        position: of the first token that differs; None if none does.
        margin: between the twin's logits of the two tokens there; 0 without a parting.
        error: largest difference between a logit of the plain way and the twin's.
        plain: root of the mean square of the differences between the plain way and the twin.
        other: the same, of the other way.
    """

    position: int | None
    margin: float
    error: float
    plain: float
    other: float

    @property
    def is_rounding(self) -> bool:
        return self.margin <= self.error and self.other <= MOST_ERROR * self.plain

    def __str__(self) -> str:
        errors = f"error {self.other:.2g}, of the plain way {self.plain:.2g}"
        if self.position is None:
            return f"same tokens; {errors}"
        why = "rounding" if self.is_rounding else "NOT rounding"
        return f"part at token {self.position + 1}: {why}, margin {self.margin:.2g} of {self.error:.2g}; {errors}"


@torch.inference_mode()
def write(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Answer one prompt greedily: int[T], and the logits that each token was chosen from, float[T, V]."""
    asked = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, **options}
    found = model.generate(**inputs, **asked)
    return found.sequences[0, -len(found.scores) :], torch.cat(found.scores)


@torch.inference_mode()
def find_parting(
    model: Any, inputs: dict[str, Any], plain: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> Parting:
    """Compare two answers to one prompt.

    Args:
        model: the model as it was loaded, in few bits; its twin takes the memory of a copy in float32.
        inputs: the prompt.
        plain, other: what `write` returned.
    """
    tokens, length = plain[0], min(len(plain[0]), len(other[0]))
    differs = (tokens[:length] != other[0][:length]).nonzero()
    position = int(differs[0]) if len(differs) else None
    shared = (
        length if position is None else position + 1
    )  # the last of these tokens may differ; what it follows does not
    twin = copy.deepcopy(model).float()
    whole = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items() if isinstance(x, Tensor)}
    name = "lang_x" if "lang_x" in whole else "input_ids"
    whole[name] = torch.cat([whole[name], tokens[None, : shared - 1]], dim=1)
    whole["attention_mask"] = torch.ones_like(whole[name])
    logits = twin(**whole).logits[0, -shared:].float()
    errors = [(x[1][:shared].float() - logits)[logits.isfinite() & x[1][:shared].isfinite()] for x in (plain, other)]
    margin = 0.0
    if position is not None:
        margin = float((logits[-1, tokens[position]] - logits[-1, other[0][position]]).abs())
    of_plain, of_other = (float(x.square().mean().sqrt()) for x in errors)
    return Parting(position, margin, float(errors[0].abs().max()), of_plain, of_other)
