"""`vlm cost --crossing`: from how many text tokens on which of two models costs less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlm_cli.cli import console
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from vlm_cli.costs.subjects import Cost, Subject
    from vlm_cli.costs.workload import Workload

__all__ = ["Crossing", "find_crossings", "print_crossings"]

_MOST = 2**16  # tokens of text that are looked at


@dataclass(frozen=True)
class Crossing:
    """Which of two models costs less, for one number of pictures.

    Attributes:
        pictures: before the text.
        measure: by what.
        up_to: tokens of text that were looked at.
        changes: from how many tokens of text on, and the name of the model that costs less from there.
    """

    pictures: int
    measure: str
    up_to: int
    changes: list[tuple[int, str]]

    def describe(self) -> str:
        """Say it in words.

        >>> Crossing(8, "memory", 4096, [(1, "b"), (301, "a")]).describe()
        'b, from 301 on a'
        """
        (_, first), *others = self.changes
        return ", ".join([first, *(f"from {tokens:,} on {name}" for tokens, name in others)])


def find_crossings(
    subjects: Sequence[Subject], workloads: Sequence[Workload], announce: Callable[[str], None]
) -> list[Crossing]:
    """Find for each number of pictures, tiles and frames where the costs of two subjects cross."""
    from vlm_cli.costs.crossings import crossings

    measures: dict[str, Callable[[Cost], float]] = {
        "operations to the first token": lambda x: x.prompt.flops.total,
        "operations of a token": lambda x: x.prompt.flops.decode,
        "cache and media": lambda x: x.prompt.cache_bytes + x.prompt.media_bytes,
        "memory at the peak": lambda x: x.prompt.peak_bytes,
    }
    if subjects[0].card is not None:
        measures["seconds to the first token"] = lambda x: x.first_seconds or 0.0
        measures["seconds of a token"] = lambda x: x.token_seconds or 0.0
    found = []
    for place in dict.fromkeys(replace(x, text=1) for x in workloads):
        sizes = [subject.count(place).prompt for subject in subjects]
        most = min([x.context - x.positions for x in sizes if x.context is not None] + [_MOST])
        for name, measure in measures.items():
            announce(f"looking where the lines of {name} cross, {count_of(place.pictures, 'picture')}")
            changes = crossings(
                _cost_of(subjects[0], place, measure), _cost_of(subjects[1], place, measure), max(1, most)
            )
            named = [(tokens, subjects[second].name) for tokens, second in changes]
            found.append(Crossing(place.pictures, name, most, named))
    return found


def _cost_of(subject: Subject, place: Workload, measure: Callable[[Cost], float]) -> Callable[[int], float]:
    """Return what a text of so many tokens costs."""
    return lambda tokens: measure(subject.count(replace(place, text=tokens)))


def print_crossings(crossed: Sequence[Crossing]) -> None:
    """Print a table, a row for each number of pictures and each measure."""
    rows = [[str(x.pictures), x.measure, x.describe()] for x in crossed]
    title = f"Which costs less, up to {max(x.up_to for x in crossed):,} tokens of text"
    console.print_table(["pictures", "by", "costs less"], rows, title=title)
