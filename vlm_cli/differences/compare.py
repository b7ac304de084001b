"""Compare two models or compositions: everything that is known without an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlm_cli.differences.settings import Change, find_changes
from vlm_cli.differences.side import Side
from vlm_cli.differences.tensors import PartComparison, compare_tensors
from vlm_cli.differences.tokens import VocabularyChange, compare_vocabularies, describe_template

__all__ = ["SECTIONS", "Difference", "compare"]

#: Sections of settings, and what the command calls them.
SECTIONS = {
    "settings": "Composition",
    "model": "Model",
    "tokens": "Tokens",
    "preprocessing": "Preprocessing",
    "generation": "Generation",
}


@dataclass(frozen=True)
class Difference:
    """What differs between two sides.

    Attributes:
        a, b: the sides.
        changes: section -> settings that differ; a section that could not be compared is absent.
        parameters: part, or "total" -> parameters on each side; empty if one side's are not known.
        vocabulary: None without two tokenizers.
        tensors: None unless both sides are built.
        unknown: sentences on what could not be compared.
    """

    a: Side
    b: Side
    changes: dict[str, list[Change]]
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    vocabulary: VocabularyChange | None = None
    tensors: list[PartComparison] | None = None
    unknown: list[str] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether anything that was compared differs."""
        others = any(
            x.state not in ("equal", "unknown") for part in self.tensors or () for x in part.tensors
        )  # a tensor that is not at hand says nothing
        words = self.vocabulary is not None and self.vocabulary.differs
        return bool(others or words or any(self.changes.values()) or any(x != y for x, y in self.parameters.values()))

    def to_dict(self) -> dict[str, Any]:
        tensors = None
        if self.tensors is not None:
            each = [x.to_dict() for part in self.tensors for x in part.tensors if x.state != "equal"]
            tensors = {"parts": [part.to_dict() for part in self.tensors], "each": each}
        return {
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "differs": self.differs,
            **{section: [x.to_dict() for x in changes] for section, changes in self.changes.items()},
            "parameters": [{"part": part, "a": x, "b": y} for part, (x, y) in self.parameters.items()],
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_dict(),
            "tensors": tensors,
            "unknown": self.unknown,
        }


def compare(a: Side, b: Side, progress: Callable[[int, int], None] = lambda done, total: None) -> Difference:
    """Compare two sides.

    Args:
        a, b: the sides.
        progress: called with the number of tensors that are done, and of all.

    Raises:
        VLMError: if a tensor cannot be read.
    """
    changes = {"settings": find_changes(a.composition.to_dict(), b.composition.to_dict())}
    unknown = [f"Of {x.name}, only the settings are known: {x.unknown}" for x in (a, b) if x.unknown]
    left, right = _facts(a), _facts(b)
    if left is None or right is None:
        return Difference(a, b, changes, unknown=unknown)
    if a.place is None or b.place is None:  # a chat template of its own comes when a model is written
        for facts in (left, right):
            del facts["tokens"]["chat template"]
    changes |= {section: find_changes(left[section], right[section]) for section in left}
    counts = [x.count() for x in (a, b)]
    assert counts[0] is not None and counts[1] is not None
    rows = [{row.name: row.parameters for row in (*x.rows, x.total)} for x in counts if x is not None]
    vocabulary = None
    if a.processor is not None and b.processor is not None:
        vocabulary = compare_vocabularies(a.processor.tokenizer, b.processor.tokenizer)
    tensors = None
    if a.stored is not None and b.stored is not None:
        tensors = compare_tensors(a.stored, b.stored, progress)
        for side in (a.stored, b.stored):
            unknown += [
                f"{side.name} leaves out pretrained tensors of {part}, which are not at hand: {reason}"
                for part, reason in side.missing.items()
            ]
    parameters = {part: (rows[0].get(part, 0), rows[1].get(part, 0)) for part in dict.fromkeys([*rows[0], *rows[1]])}
    return Difference(a, b, changes, parameters, vocabulary, tensors, unknown)


def _facts(side: Side) -> dict[str, dict[str, Any]] | None:
    """Return what a model is beyond its composition, by section; None if that is not known."""
    report = side.describe()
    if report is None or side.model is None:
        return None
    found = report.to_dict()
    encoder, language = dict(found["vision_encoder"]), dict(found["language_model"])
    preprocessing = encoder.pop("preprocessing")
    named = {"class": found["class"], "dtype": found["dtype"]}
    positions = [report.positions_per_image, report.most_positions_per_image]
    tokenizer = None if side.processor is None else side.processor.tokenizer
    return {
        "model": {
            **named,
            "vision_encoder.class": encoder["class"],
            **{f"language_model.{key}": x for key, x in language.items() if key != "name"},
            "before_layers": report.before_layers,
            "adapters": side.model.config.adapters or [],
            "shapes": report.shapes,
        },
        "tokens": {
            "vision tokens per picture": report.shapes["vision_tokens"][-2],
            "positions per picture": positions[0] if positions[0] == positions[1] else positions,
            **found["tokens"],
            "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
            "chat template": None if tokenizer is None else describe_template(tokenizer),
        },
        "preprocessing": preprocessing,
        "generation": _generation(side),
    }


def _generation(side: Side) -> dict[str, Any]:
    """Return how a model ends and samples its answers, without what is not about answers."""
    assert side.model is not None
    without = ("transformers_version", "_from_model_config")
    return {key: x for key, x in side.model.generation_config.to_diff_dict().items() if key not in without}
