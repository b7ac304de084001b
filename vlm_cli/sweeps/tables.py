"""Tables of a sweep: for a terminal, as comma-separated values and in Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.printable import markdown_text
from vlm_cli.report.tables import human_count
from vlm_cli.sweeps.dimensions import describe_value
from vlm_cli.sweeps.overview import Overview

__all__ = ["Table", "overview_table"]


@dataclass(frozen=True)
class Table:
    """A table in exact numbers, for programs, and in short ones, for people.

    Attributes:
        heads, rows: exact; a value that does not exist is None.
        short_heads, short_rows: for people.
        notes: lines below the table for people.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    short_heads: Sequence[str]
    short_rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def to_csv(self) -> str:
        """Write the exact numbers as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.heads)
        writer.writerows(["" if x is None else x for x in row] for row in self.rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Write the short numbers as a Markdown table, with the notes below it."""
        kinds = ["--:" if _is_number_column(self.short_rows, i) else "---" for i in range(len(self.short_heads))]
        lines = [self.short_heads, kinds, *([markdown_text(x) for x in row] for row in self.short_rows)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        notes = "".join(f"- {markdown_text(note)}\n" for note in self.notes)
        return f"{table}\n{notes}" if notes else table


def overview_table(rows: Sequence[Overview]) -> Table:
    """Make the table of what each composition costs. Dimensions of one value stand below it."""
    names, notes = split_names([row.candidate.values for row in rows])
    heads = ["#", *names, "parameters", "trainable", "tokens_per_image", "positions_per_image", "same_as", "problem"]
    exact = []
    for row in rows:
        data = row.to_dict()
        values = [describe_value(row.candidate.values[name]) for name in names]
        exact.append([row.candidate.number, *values, *(_plain(data.get(head)) for head in heads[1 + len(names) :])])
    short_heads = ["#", *map(short_name, names), "Parameters", "Trainable", "Tokens/image", "Positions/image"]
    short = [_short(row, names) for row in rows]
    notes += list(_impossible(rows))
    notes += [f"{x.candidate.number} is the same as {x.candidate.same_as}." for x in rows if x.candidate.same_as]
    return Table(heads, exact, short_heads, short, notes)


def _impossible(rows: Sequence[Overview]) -> Iterator[str]:
    """Yield each reason why compositions are impossible, with their numbers."""
    problems = dict.fromkeys(x.candidate.problem for x in rows if x.candidate.problem)
    for problem in problems:
        numbers = [str(x.candidate.number) for x in rows if x.candidate.problem == problem]
        yield f"{', '.join(numbers)} {'is' if len(numbers) == 1 else 'are'} impossible: {problem}"


def split_names(values: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return the names of the dimensions in which rows differ, and lines about the others."""
    first = values[0]
    names = [name for name in first if any(x[name] != first[name] for x in values)]
    return names, [f"{name} is {describe_value(x)} everywhere." for name, x in first.items() if name not in names]


def short_name(name: str) -> str:
    """Return the last part of a dotted name, as people read it.

    >>> short_name("vision_tokenizer.num_latents"), short_name("vision_tokenizer")
    ('num latents', 'tokenizer')
    """
    last = name.rpartition(".")[2]
    return last.removeprefix("vision_").replace("_", " ")


def range_text(numbers: tuple[int, int]) -> str:
    """Write a number, or the least and the most."""
    least, most = numbers
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def _short(row: Overview, names: Sequence[str]) -> list[str]:
    values = [str(row.candidate.number), *(describe_value(row.candidate.values[name]) for name in names)]
    costs = row.costs
    if costs is None:
        return [*values, "impossible", "", "", ""]
    numbers = [human_count(costs.parameters), human_count(costs.trainable)]
    return [*values, *numbers, range_text(costs.tokens), range_text(costs.positions)]


def _plain(value: Any) -> Any:
    """Write the least and the most as one cell."""
    return "-".join(map(str, value)) if isinstance(value, list) else value


def _is_number_column(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows]
    return any(cells) and all(not x or x.lstrip("-+~<").strip()[:1].isdigit() for x in cells)
