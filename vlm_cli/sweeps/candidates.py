"""The compositions of a sweep: what BASE says, with the values of each point of the grid over it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_cli.composition import FAMILIES, Composition, read_file, split_name
from vlm_cli.errors import CompositionError, UsageError, VLMError
from vlm_cli.flags import list_settings
from vlm_cli.lookalike import find_named
from vlm_cli.models import resolve
from vlm_cli.registry import suggest
from vlm_cli.sweeps.dimensions import TRAINING, Dimension, Values, as_layers, describe_value, make_grid, training_values
from vlm_cli.training.setting_kinds import kind_of, plain_settings
from vlm_cli.training.settings import TrainingSettings

__all__ = ["Base", "Candidate", "find_reference", "make_candidates"]

#: Settings of `vlm train` that a sweep sets itself, or that would be unfair, and what to do instead.
_NOT_VARIED = {"seed": "give --seeds", "max_steps": "give --budget", "max_minutes": "give --budget"}


@dataclass(frozen=True)
class Base:
    """What all compositions begin with.

    Attributes:
        name: what the user typed.
        family: a family, or None.
        layer: plain data over the family; empty for the family alone.
    """

    name: str
    family: str | None = None
    layer: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Base:
        """Find a family or a composition file. It may leave open what the grid names.

        Raises:
            VLMError: if there is none of this name, or it is a model that is built already.
        """
        path = find_named(name)
        if name in FAMILIES and not path.exists():
            return cls(name, family=name)
        if path.is_file() and path.suffix in (".yaml", ".yml", ".json"):
            return cls(name, layer=read_file(path))
        found = resolve(name)  # says what is wrong with every other name
        raise CompositionError(
            f"{name!r} is built already, and the models of a sweep begin anew. Start from its composition: "
            f"{Path(str(found)) / 'composition.yaml'}"
        )

    def compose(self, values: Values) -> Composition:
        """Make the composition of a point.

        Raises:
            CompositionError: with all problems at once.
        """
        layers = [_split_encoder(layer) for layer in as_layers(values)]
        return Composition.compose(self.family, self.layer, *layers)


@dataclass(frozen=True)
class Candidate:
    """A point of the grid.

    Attributes:
        number: from 1, in the order of the grid.
        values: of the dimensions.
        settings: how it trains.
        composition: None if the values do not fit each other.
        problem: why it is impossible; None if it is possible as far as is known.
        same_as: the number of an earlier candidate that is the same in other words.
    """

    number: int
    values: Values
    settings: TrainingSettings
    composition: Composition | None
    problem: str | None = None
    same_as: int | None = None

    @property
    def label(self) -> str:
        """Its values in words."""
        return ", ".join(map(describe_value, self.values.values())) or "base"

    @property
    def identity(self) -> str:
        """A hash that is equal if and only if it is the same model, trained in the same way."""
        assert self.composition is not None
        return digest({"composition": _identity(self.composition), "training": self.settings.to_dict()})


def digest(data: Any) -> str:
    """Return the hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_candidates(base: Base, dimensions: Sequence[Dimension], settings: TrainingSettings) -> list[Candidate]:
    """Make the candidates of a grid; those whose values do not fit each other have a `problem`.

    Raises:
        UsageError: if a setting or a value fits nowhere in the grid, so that it is a mistake.
    """
    _check_training(dimensions)
    candidates: list[Candidate] = []
    seen: dict[str, int] = {}
    for number, values in enumerate(make_grid(dimensions), start=1):
        found = _make(base, number, values, settings)
        if found.composition is not None:
            found = dataclasses.replace(found, same_as=seen.get(found.identity))
            seen.setdefault(found.identity, number)
        candidates.append(found)
    _check_values(base, dimensions, candidates)
    return candidates


def find_reference(base: Base, dimensions: Sequence[Dimension], candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate with which others are compared: BASE itself if the grid has it, else the first possible."""
    possible = [x for x in candidates if x.problem is None and x.same_as is None]
    try:
        own = base.compose({x.name: x.values[0] for x in dimensions if not x.varies})
    except CompositionError:  # BASE leaves open what the grid names
        own = None
    equal = [x for x in possible if own is not None and x.composition == own]
    return next(iter([*equal, *possible]), None)


def _make(base: Base, number: int, values: Values, settings: TrainingSettings) -> Candidate:
    try:
        mine = vary(settings, training_values(values))
        return Candidate(number, values, mine, base.compose(values))
    except (CompositionError, UsageError) as error:
        return Candidate(number, values, settings, None, _first_problem(error))


def vary(settings: TrainingSettings, values: Mapping[str, Any]) -> TrainingSettings:
    """Return settings with other values.

    Raises:
        UsageError: naming each that is not possible.
    """
    kinds = {x.name: kind_of(x) for x in list_settings(TrainingSettings)}
    problems = [y for name, x in values.items() for y in kinds[name].find_problems(x, f"train.{name}")]
    if problems:
        raise UsageError("\n".join(problems))
    return dataclasses.replace(settings, **plain_settings(values))


def _first_problem(error: Exception) -> str:
    problems = getattr(error, "problems", None) or [str(error)]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def _check_training(dimensions: Sequence[Dimension]) -> None:
    """Check the names of `train.NAME`.

    Raises:
        UsageError: for an unknown one, or one that a sweep does not vary.
    """
    known = [x.name for x in dataclasses.fields(TrainingSettings) if x.name not in _NOT_VARIED]
    for name in training_values({x.name: None for x in dimensions}):
        if name in _NOT_VARIED:
            raise UsageError(f"--set train.{name} cannot be varied: {_NOT_VARIED[name]}.")
        if name not in known:
            raise UsageError(
                f"unknown setting 'train.{name}' of --set.{suggest(name, known)} Known after train.: "
                f"{', '.join(known)}."
            )


def _check_values(base: Base, dimensions: Sequence[Dimension], candidates: Sequence[Candidate]) -> None:
    """Check that each value fits somewhere in the grid, or would without the settings of other parts beside it.

    Raises:
        UsageError: with the reason why one does not, or if nothing is possible.
    """
    for dimension in dimensions:
        for value in dimension.values:
            own = [x for x in candidates if x.values[dimension.name] == value]
            if all(x.composition is None for x in own) and (
                problem := _problem_alone(base, dimensions, dimension, own[0])
            ):
                raise UsageError(f"--set {dimension.name}={describe_value(value)} fits nowhere: {problem}")
    if all(x.composition is None for x in candidates):
        raise UsageError(f"no composition is possible: {candidates[0].problem}")


def _problem_alone(base: Base, dimensions: Sequence[Dimension], own: Dimension, candidate: Candidate) -> str | None:
    """Say why a candidate is impossible even without the other settings inside of its parts; None if it is not."""
    others = [x for x in dimensions if x is not own]
    inside = {x.name for x in others if "." in x.name and x.name.partition(".")[0] != TRAINING}
    found = _make(base, 0, {k: x for k, x in candidate.values.items() if k not in inside}, TrainingSettings())
    return found.problem


def _split_encoder(layer: dict[str, Any]) -> dict[str, Any]:
    """Read NAME:TAG, as --vision-encoder does."""
    name = layer.get("vision_encoder")
    return {"vision_encoder": split_name(name)} if isinstance(name, str) else layer


def _identity(composition: Composition) -> dict[str, Any]:
    """Return what makes a composition the model that it is; a family is only where it comes from."""
    return {key: x for key, x in composition.to_dict().items() if key != "family"}


def mark_impossible(candidate: Candidate, error: VLMError) -> Candidate:
    """Return a candidate with the reason why its parts do not make a model."""
    return dataclasses.replace(candidate, problem=_first_problem(error))
