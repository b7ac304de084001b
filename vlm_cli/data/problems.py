"""Rows that cannot be used, and the message that lists them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm_cli.data.record import Record
from vlm_cli.data.sources import Row, Source

__all__ = ["MOST_SHOWN", "Problem", "describe_problems"]

MOST_SHOWN = 20  # bad rows that a message lists


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    Attributes:
        line: number of the row in its shard.
        message: the reason.
        shard: name of the file; empty for the only one.
        unit: what messages call a row.
    """

    line: int
    message: str
    shard: str = ""
    unit: str = "line"

    @classmethod
    def of(cls, row: Row | Record, message: str) -> Problem:
        """Make the problem of a row, or of the record that was made of it."""
        number = row.line if isinstance(row, Record) else row.number
        return cls(number, message, row.shard, row.unit)


def describe_problems(problems: Iterable[Problem], total: int, origin: Source) -> str:
    """List bad rows.

    Args:
        problems: at least one.
        total: number of rows in the source.
        origin: the source.
    """
    shards, name = list(origin.shards), origin.quoted
    order = {shard: i for i, shard in enumerate(shards)}
    problems = sorted(problems, key=lambda p: (order.get(p.shard, 0), p.line))
    head = (
        f"{len(problems)} of the {total} records in {name} cannot be used:"
        if total > 1
        else f"the only record in {name} cannot be used:"
    )

    def place(problem: Problem) -> str:
        return f"{problem.line} of {problem.shard}" if len(shards) > 1 else str(problem.line)

    lines = [f"  {p.unit} {place(p)}: {p.message}" for p in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        rest = [place(p) for p in problems[MOST_SHOWN:]]
        shown = ", ".join(rest[:MOST_SHOWN]) + (", …" if len(rest) > MOST_SHOWN else "")
        lines.append(f"  … and {len(rest)} more: {problems[0].unit}s {shown}")
    return "\n".join([head, *lines])
