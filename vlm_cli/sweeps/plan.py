"""`Plan`: a sweep as plain data, whose keys are the options of `vlm sweep`; a file holds it, too.

base: base.yaml
set: {vision_tokenizer: [linear, perceiver], fusion.every: [1, 2]}
seeds: [0, 1]
data: train.jsonl
eval_data: held-out.jsonl
budget: 10m
learning_rate: 1e-3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_cli.data.formats import ColumnMap
from vlm_cli.data.inputs import is_pipe
from vlm_cli.data.mixture import Mixture
from vlm_cli.data.records import Reading
from vlm_cli.errors import UsageError
from vlm_cli.flags import list_settings
from vlm_cli.registry import suggest
from vlm_cli.schema import ANYTHING, Kind, check, either, list_of, mapping, mapping_of, number, text, whole
from vlm_cli.sweeps.budget import Budget
from vlm_cli.sweeps.candidates import Base
from vlm_cli.sweeps.dimensions import Dimension, make_dimension
from vlm_cli.training.setting_kinds import kind_of, plain_settings
from vlm_cli.training.settings import TrainingSettings

__all__ = ["MADE", "QUESTIONS", "READING", "Plan"]

MADE = "made_with"  # what a finished sweep adds to its file: versions and hashes of the data
QUESTIONS = ("metric", "limit", "max_new_tokens")  # options of `vlm eval`
READING = ("columns", "image_folder", "media_root", "max_pixels")  # options of `vlm train` and of `vlm eval`
MOST_SEEDS = 100
_MAX_SEED = 2**32 - 1
_MOST = 1_000_000_000
_BUDGETS = {"steps": "max_steps", "minutes": "max_minutes"}

_names = either(text(), list_of(text(), least=1, most=1_000))
_KINDS: dict[str, Kind] = {
    "base": either(text(), mapping({})),
    "set": mapping_of(ANYTHING),
    "seeds": either(whole(0, _MAX_SEED), list_of(whole(0, _MAX_SEED), least=1, most=MOST_SEEDS)),
    "data": _names,
    "weights": either(text(), list_of(number(0, _MOST), least=1, most=1_000)),
    "eval_data": text(),
    "budget": either(text(), whole(1, _MOST)),
    "metric": text(),
    "limit": whole(1, _MOST),
    "max_new_tokens": whole(1, 1_000_000),
    "columns": text(),
    "image_folder": text(),
    "media_root": text(),
    "max_pixels": whole(1, 2**33),
    MADE: mapping({}),
}


@dataclass(frozen=True)
class Plan:
    """What a sweep compares, how it trains and what it asks.

    Attributes:
        values: plain data under the names of the options.
        place: how messages name where the values come from.

    Raises:
        UsageError: for an unknown key, or a value that is not possible.
    """

    values: Mapping[str, Any]
    place: str = "the sweep"

    def __post_init__(self) -> None:
        known = _KINDS | {x.name: kind_of(x) for x in list_settings(TrainingSettings) if x.name != "seed"}
        for key in self.values:
            if key not in known:
                hint = " Give seeds." if key == "seed" else suggest(str(key), known)
                raise UsageError(f"{self.place} has an unknown key {str(key)!r}.{hint} Known: {', '.join(known)}.")
        check(self.values, mapping({}, known), self.place, UsageError)
        if "base" not in self.values:
            raise UsageError("no BASE is given: vlm sweep BASE --set NAME=VALUE,VALUE")
        _ = self.settings, self.dimensions, self.seeds, self.budget

    @cached_property
    def base(self) -> Base:
        """What all compositions begin with."""
        given = self.values["base"]
        return Base.read(given) if isinstance(given, str) else Base("base", layer=given)

    @cached_property
    def dimensions(self) -> list[Dimension]:
        """What varies, in the order in which it is given."""
        given = self.values.get("set", {})
        return [make_dimension(name, x if isinstance(x, list) else [x]) for name, x in given.items()]

    @cached_property
    def seeds(self) -> list[int]:
        """Of the weights that start at random, and of the order of the records."""
        given = self.values.get("seeds", [0])
        seeds = given if isinstance(given, list) else [given]
        if (twice := next((x for x in seeds if seeds.count(x) > 1), None)) is not None:
            raise UsageError(f"--seeds names {twice} twice, which would be the same run. Give it once.")
        return seeds

    @cached_property
    def budget(self) -> Budget | None:
        """What each run may use; None if other settings say how long it trains."""
        given = self.values.get("budget")
        if given is None:
            return None
        for name in ("max_steps", "max_minutes", "epochs"):
            if self.values.get(name) is not None:
                raise UsageError(f"--budget and --{name.replace('_', '-')} both say how long a run trains. Give one.")
        return Budget.parse(str(given))

    @cached_property
    def settings(self) -> TrainingSettings:
        """How each model learns, its seed and a budget of operations aside."""
        names = {x.name for x in list_settings(TrainingSettings)}
        given = {key: x for key, x in self.values.items() if key in names and x is not None}
        if (budget := self.budget) is not None and budget.unit in _BUDGETS:
            amount = int(budget.amount) if budget.unit == "steps" else budget.amount
            given[_BUDGETS[budget.unit]] = amount
        elif budget is not None:
            given["max_steps"] = 1  # until `Costs` says how many steps of a composition the operations are
        settings = TrainingSettings(**plain_settings(given))
        if settings.best is not None:
            raise UsageError("--best would choose weights by the questions that then compare them. Leave it out.")
        return settings

    @property
    def trains(self) -> bool:
        """Whether the sweep trains, or only shows what each composition costs."""
        return "data" in self.values

    @property
    def data(self) -> list[str]:
        """Sources of records to learn."""
        given = self.values.get("data", [])
        return given if isinstance(given, list) else [given]

    @property
    def weights(self) -> list[float] | None:
        """How often each source is drawn."""
        given = self.values.get("weights")
        if isinstance(given, str):
            try:
                return [float(x) for x in given.split(",")]
            except ValueError:
                raise UsageError(f"--weights expects numbers, such as 2,1, got {given!r}.") from None
        return given

    @cached_property
    def mixture(self) -> Mixture:
        """The records to learn."""
        return Mixture.of(self.data, self.weights)

    @property
    def eval_data(self) -> str:
        """Records with the questions."""
        return str(self.values["eval_data"])

    @cached_property
    def reading(self) -> Reading:
        """How records and pictures are read."""
        columns, folder, root, pixels = (self.values.get(name) for name in READING)
        return Reading(
            None if root is None else Path(root),
            pixels,
            None if folder is None else Path(folder),
            None if columns is None else ColumnMap.parse(columns),
        )

    def check_training(self) -> None:
        """Check that what a training needs is there.

        Raises:
            UsageError: naming what is missing, or cannot be.
        """
        if "eval_data" not in self.values:
            raise UsageError("--data trains models, and nothing compares them. Add --eval-data FILE.")
        if self.budget is None and not any(self.values.get(x) for x in ("max_steps", "max_minutes", "epochs")):
            raise UsageError("nothing says how long each run trains. Add --budget 10m, a number of steps, or FLOPs.")
        for path in [*self.mixture.pipes, *(x for x in [Path(self.eval_data)] if is_pipe(x))]:
            raise UsageError(f"{str(path)!r} is a pipe, which only one run could read. Give a file.")

    def words(self, names: Sequence[str]) -> list[str]:
        """Write the values of some options as words of a command line."""
        pairs = [(f"--{name.replace('_', '-')}", self.values.get(name)) for name in names]
        return [word for name, x in pairs if x is not None for word in (name, str(x))]
