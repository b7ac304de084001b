"""Several sources of records, and how often each is drawn: given one by one, or as one file of YAML.

    seed: 7
    sources:
      - {data: captions.jsonl, weight: 2}
      - {data: "hf:ORG/NAME:CONFIG", weight: 1, columns: {prompt: question, completion: answer}}
      - {data: "shards/{000..012}.tar", share: 0.3}

Without weights and shares, the sources are one long file: a pass shows each record once. With them, about 3 of each 10
records come from the last source here, and of the other 7 twice as many from the first as from the second; a small
source is then seen more often than a large one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_cli.data.formats import ColumnMap
from vlm_cli.data.inputs import is_pipe
from vlm_cli.data.records import Reading
from vlm_cli.data.sources import Source, open_source
from vlm_cli.errors import UsageError
from vlm_cli.lookalike import find_named
from vlm_cli.plain_data import COMPOSITION_BYTES, parse_yaml, read_text
from vlm_cli.registry import suggest
from vlm_cli.schema import check, list_of, mapping, mapping_of, number, text, whole

__all__ = ["Ingredient", "Mixture", "is_mixture_file", "place_data"]

_MOST = 1_000  # sources of a mixture
_LARGEST = 1e9  # weight
_KEYS = ("data", "weight", "share", "columns", "image_folder")


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture.

    Attributes:
        data: what `open_source` opens.
        weight: how often it is drawn, in relation to the other weights.
        share: of the records that are drawn, from 0 to 1.
        columns: which of its columns are what; None for what holds for the whole mixture.
        image_folder: where relative paths of its pictures start; None for what holds for the whole mixture.
    """

    data: str
    weight: float | None = None
    share: float | None = None
    columns: ColumnMap | None = None
    image_folder: Path | None = None

    def refine(self, reading: Reading) -> Reading:
        """Return what holds for this source, where `reading` holds for the whole mixture."""
        columns, folder = self.columns or reading.columns, self.image_folder or reading.image_folder
        return replace(reading, columns=columns, image_folder=folder)


@dataclass(frozen=True)
class Mixture:
    """Sources, each with another name.

    Attributes:
        ingredients: at least one.
        seed: of the order in which records are drawn; None for that of the run.

    Raises:
        UsageError: if two sources have one name, or weights and shares do not fit together.
    """

    ingredients: tuple[Ingredient, ...]
    seed: int | None = None

    def __post_init__(self) -> None:
        names = [x.data for x in self.ingredients]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"two sources have the name {twice!r}. Give it once; a weight says how often it is drawn.")
        self._find_weights()

    @classmethod
    def of(cls, names: Sequence[str | Path], weights: Sequence[float] | None = None) -> Mixture:
        """Make a mixture of what a user gives for `--data`, once or several times, and for `--weights`.

        A single name that ends with .yaml or .yml is a file of a mixture.

        Raises:
            UsageError: if the numbers of sources and weights differ, or the mixture cannot be made.
        """
        texts = [str(name) for name in names]
        files = [name for name in texts if is_mixture_file(name)]
        if files and (len(texts) > 1 or weights is not None):
            raise UsageError(f"{files[0]!r} is a mixture. Give it alone, and write other sources and weights in it.")
        if files:
            return read_mixture(Path(files[0]))
        if weights is not None and len(weights) != len(texts):
            raise UsageError(
                f"--weights gives {len(weights)} numbers for {len(texts)} sources. Give one for each --data, in order."
            )
        found = [None] * len(texts) if weights is None else weights
        return cls(tuple(Ingredient(name, weight) for name, weight in zip(texts, found, strict=True)))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """How often each source is drawn: shares of 1. None if each record is drawn once in a pass."""
        return self._find_weights()

    @property
    def pipes(self) -> list[Path]:
        """The sources that can be read only once."""
        return [Path(x.data) for x in self.ingredients if is_pipe(Path(x.data))]

    def open(self) -> Iterator[Source]:
        """Open the sources, one after the other.

        Raises:
            DataError, UsageError: as in `open_source`.
        """
        return (open_source(x.data) for x in self.ingredients)

    def describe(self) -> str:
        """Name the sources, for the log."""
        names = [x.data for x in self.ingredients]
        return names[0] if len(names) == 1 else f"{len(names)} sources"

    def to_dict(self) -> dict[str, Any]:
        """Return the mixture as its file has it, without what is not given."""
        sources = []
        for x in self.ingredients:
            columns = None if x.columns is None else dict(x.columns.columns)
            values = (x.data, x.weight, x.share, columns, None if x.image_folder is None else str(x.image_folder))
            sources.append({key: value for key, value in zip(_KEYS, values, strict=True) if value is not None})
        return {"sources": sources, **({} if self.seed is None else {"seed": self.seed})}

    def _find_weights(self) -> tuple[float, ...] | None:
        given = [x for x in self.ingredients if x.weight is not None or x.share is not None]
        if not given:
            return None
        for x in self.ingredients:
            if (x.weight is None) == (x.share is None):
                what = "neither a weight nor a share" if x.weight is None else "both a weight and a share"
                raise UsageError(f"the source {x.data!r} has {what}. Give each source one of them, or none to any.")
            for name, value, most in (("weight", x.weight, _LARGEST), ("share", x.share, 1.0)):
                if value is not None and not (math.isfinite(value) and 0 <= value <= most):
                    raise UsageError(f"the {name} of {x.data!r} must be from 0 to {most:g}, but is {value}.")
        shares = math.fsum(x.share or 0.0 for x in self.ingredients)
        weights = math.fsum(x.weight or 0.0 for x in self.ingredients)
        has_weights = any(x.weight is not None for x in self.ingredients)
        if has_weights and not weights:
            raise UsageError("the weights of the sources sum to 0, so that none would be drawn. Give one above 0.")
        left = 1 - shares
        if left < -1e-9 or (not has_weights and left > 1e-9) or (has_weights and left <= 1e-9):
            possible = "less than 1, to leave something to the weights" if has_weights else "1"
            raise UsageError(f"the shares of the sources sum to {shares:g}; they must sum to {possible}.")
        return tuple(
            float(x.share) if x.share is not None else left * float(x.weight or 0) / weights for x in self.ingredients
        )


def is_mixture_file(name: str) -> bool:
    """Tell whether a name is that of a file of a mixture."""
    return name.lower().endswith((".yaml", ".yml"))


def read_mixture(path: Path) -> Mixture:
    """Read a file of a mixture. Relative paths in it start at its folder.

    Raises:
        UsageError: if it cannot be read, or holds no mixture.
    """
    path = find_named(path)
    try:
        data = parse_yaml(read_text(path, most_bytes=COMPOSITION_BYTES))
    except OSError as error:
        raise UsageError(f"cannot read the mixture {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"the mixture {str(path)!r} is not valid: {error}.") from None
    file = f"the mixture {str(path)!r}"
    source = mapping(
        {"data": text()},
        {
            "weight": number(0, _LARGEST),
            "share": number(0, 1),
            "columns": mapping_of(text()),
            "image_folder": text(),
        },
    )
    check(
        data,
        mapping({"sources": list_of(source, least=1, most=_MOST)}, {"seed": whole(0, 2**32 - 1)}),
        file,
        UsageError,
    )
    _check_keys(data, ("sources", "seed"), file)
    for x in data["sources"]:
        _check_keys(x, _KEYS, f"the source {x['data']!r} of {file}")
    return Mixture(tuple(_read_ingredient(x, path.parent) for x in data["sources"]), data.get("seed"))


def _read_ingredient(data: dict[str, Any], folder: Path) -> Ingredient:
    columns, images = data.get("columns"), data.get("image_folder")
    return Ingredient(
        place_data(data["data"], folder),
        data.get("weight"),
        data.get("share"),
        None if columns is None else ColumnMap.parse(",".join(f"{key}={x}" for key, x in columns.items())),
        None if images is None else folder / images,
    )


def place_data(name: str, folder: Path) -> str:
    """Return what a file in a folder means by a name: a path starts at the folder, a data set of the hub does not."""
    return name if name.startswith("hf:") else str(folder / name)


def _check_keys(data: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in data:
        if key not in known:
            raise UsageError(
                f"{place} has an unknown key {str(key)!r}.{suggest(str(key), known)} Known: {', '.join(known)}."
            )
