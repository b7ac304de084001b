"""One of two things that are compared: a built model or a composition, with all that is known without its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_cli.checkpoint.stored import StoredModel
from vlm_cli.composition import Composition, CompositionRequest
from vlm_cli.errors import VLMError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import load_meta_model, read_processor_of, resolve
from vlm_cli.processor import VLMProcessor
from vlm_cli.report.description import ModelDescription, describe
from vlm_cli.report.parameters import ParameterReport, count_parameters

__all__ = ["Side"]


@dataclass
class Side:
    """One side of a comparison.

    Attributes:
        name: what the user typed.
        place: directory or hub id of a built model; None for a composition.
        composition: its parts and settings.
        model: on the meta device; None if a part of a composition is not at hand.
        dtype: of the weights.
        processor: None without a tokenizer.
        stored: the tensors of a built model.
        unknown: why `model` is None; empty otherwise.
    """

    name: str
    place: str | None
    composition: Composition
    model: VLM | None = field(repr=False, default=None)
    dtype: torch.dtype = torch.float32
    processor: VLMProcessor | None = field(repr=False, default=None)
    stored: StoredModel | None = field(repr=False, default=None)
    unknown: str = ""

    @classmethod
    def open(cls, name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Side:
        """Find what a name means. Of a built model, the names and shapes of its tensors are read.

        Args:
            name: "demo", a directory, a hub id, a family or a composition file.
            revision: branch, tag or commit of a hub id.
            trust_remote_code: whether the language model's own code may run.

        Raises:
            VLMError: if it means nothing, or a built model cannot be read.
        """
        chosen = resolve(name, CompositionRequest(revision=revision))
        how: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if isinstance(chosen, Composition):
            try:
                model, dtype, processor = load_meta_model(chosen, **how)
            except VLMError as error:
                return cls(name, None, chosen, unknown=str(error))
            return cls(name, None, chosen, model, dtype, processor)
        model, dtype, _ = load_meta_model(chosen, **how)
        stored = StoredModel.open(chosen, model, **how)
        processor = read_processor_of(chosen, revision, trust_remote_code=trust_remote_code)
        return cls(name, chosen, model.config.composition, model, dtype, processor, stored)

    def describe(self) -> ModelDescription | None:
        """Describe the model; its gates are among the tensors."""
        if self.model is None:
            return None
        tokenizer = None if self.processor is None else self.processor.tokenizer
        return describe(self.model, tokenizer, dtype=self.dtype, gate_values={})

    def count(self) -> ParameterReport | None:
        """Count the parameters."""
        return None if self.model is None else count_parameters(self.model, dtype=self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "composition" if self.place is None else "model",
            "class": None if self.model is None else type(self.model).__name__,
            "unknown": self.unknown or None,
        }
