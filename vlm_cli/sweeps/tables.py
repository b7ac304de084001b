"""Tables of a sweep: for a terminal, as comma-separated values and in Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.evaluation.figures import difference_cells, estimate_cells
from vlm_cli.printable import markdown_text
from vlm_cli.report.tables import human_count
from vlm_cli.sweeps.dimensions import Values, describe_value
from vlm_cli.sweeps.overview import PROMPT, Overview
from vlm_cli.sweeps.results import Results, Row

#: What the column FLOPs holds.
FLOPS_NOTE = f"FLOPs are those of a prompt of one picture and {PROMPT.text} tokens of text, up to the first new token."
_COSTS = ("parameters", "trainable", "tokens_per_image", "positions_per_image", "flops_per_prompt")

__all__ = ["Table", "overview_table", "results_table", "shorten_values", "split_names"]


@dataclass(frozen=True)
class Table:
    """A table in exact numbers, for programs, and in short ones, for people.

    Attributes:
        heads, rows: exact; a value that does not exist is None.
        short_heads, short_rows: for people.
        notes: lines below the table for people.
        optional: short heads that a narrow terminal does without, the least important one first.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    short_heads: Sequence[str]
    short_rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    optional: Sequence[str] = ()

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
        lines = [self.short_heads, kinds, *([_escape(x) for x in row] for row in self.short_rows)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        notes = "".join(f"- {_escape(note)}\n" for note in self.notes)
        return f"{table}\n{notes}" if notes else table


def _escape(text: str) -> str:
    """Write a text in Markdown; one of numbers and plain words stays as it is."""
    return text if re.fullmatch(r"[\w ,.%–+(){}=:;<'/-]*(?<!_)", text) and "__" not in text else markdown_text(text)


def overview_table(rows: Sequence[Overview]) -> Table:
    """Make the table of what each composition costs. Dimensions of one value stand below it."""
    names, notes = split_names([row.candidate.values for row in rows])
    heads = ["#", *names, *_COSTS, "same_as", "problem"]
    exact = []
    for row in rows:
        data = row.to_dict()
        values = [describe_value(row.candidate.values[name]) for name in names]
        exact.append([row.candidate.number, *values, *(_plain(data.get(head)) for head in heads[1 + len(names) :])])
    short_heads = ["#", *map(short_name, names), "Parameters", "Trainable", "Tokens/image", "Positions/image", "FLOPs"]
    words, more = shorten_values(names, [row.candidate.values for row in rows])
    short = [_short(row, _name_values(row, names, words)) for row in rows]
    notes += more
    notes += list(_impossible(rows))
    notes += [f"{x.candidate.number} is the same as {x.candidate.same_as}." for x in rows if x.candidate.same_as]
    notes.append(FLOPS_NOTE)
    return Table(heads, exact, short_heads, short, notes, ("Trainable", "Positions/image", "Parameters"))


def results_table(results: Results) -> Table:
    """Make the table of scores: a row for each composition and figure, the base marked by a star."""
    names, notes = split_names([row.candidate.values for row in results.rows])
    heads = ["#", *names, *_COSTS, "is_base"]
    heads += ["metric", "items", "seeds", "score", "low", "high", "difference", "difference_low", "difference_high"]
    heads += ["p_value", "seed_scores", "training_flops", "steps", "seconds", "loss", "problem"]
    exact = [cells for row in results.rows for cells in _exact_cells(row, names)]
    short_heads = ["#", *map(short_name, names), "Parameters", "Tokens/image", "FLOPs"]
    short_heads += ["Metric", "Score", "95 % interval", "Each seed", "Difference", "Its interval", "p"]
    words, more = shorten_values(names, [row.candidate.values for row in results.rows])
    notes += more
    short = [x for row in results.rows for x in _score_cells(row, _name_values(row.overview, names, words))]
    overviews = [row.overview for row in results.rows]
    notes += [FLOPS_NOTE, *_impossible(overviews)]
    notes += [f"{x.candidate.number} is the same as {x.candidate.same_as}." for x in overviews if x.candidate.same_as]
    notes += [f"{x.run.name} failed: {x.problem}" for row in results.rows for x in row.seeds if x.problem]
    if waiting := sum(x.score is None and x.problem is None for row in results.rows for x in row.seeds):
        notes.append(f"Not done yet: {waiting} of {sum(len(row.seeds) for row in results.rows)} runs.")
    optional = ("Tokens/image", "FLOPs", "Parameters", "Metric", "Each seed", "Its interval")
    return Table(heads, exact, short_heads, short, notes, optional)


def _exact_cells(row: Row, names: Sequence[str]) -> Iterator[list[Any]]:
    """Yield the cells of each figure of a row; one row without a score."""
    data, values = row.overview.to_dict(), [describe_value(row.candidate.values[name]) for name in names]
    costs = [_plain(data.get(x)) for x in _COSTS]
    begin = [row.candidate.number, *values, *costs, row.is_base]
    flops = row.training_flops
    training = [None if flops is None else round(flops), *(row.mean_of(x) for x in ("steps", "seconds", "loss"))]
    failed = "; ".join(f"seed {x.run.seed}: {x.problem}" for x in row.seeds if x.problem)
    end = [*training, row.candidate.problem or failed or None]
    if row.score is None:
        yield [*begin, *[None] * 11, *end]
        return
    for i, estimate in enumerate(row.score.estimates):
        each = ";".join(f"{x.run.seed}={x.score.estimates[i].value:.6g}" for x in row.seeds if x.score)
        done = sum(x.score is not None for x in row.seeds)
        found = row.differences[i] if row.differences else None
        apart = [None] * 4 if found is None else [found.value, *found.interval, found.p_value]
        figure = [estimate.figure.name, row.score.items, done, estimate.value, *estimate.interval]
        yield [*begin, *figure, *apart, each, *end]


def _score_cells(row: Row, values: list[str]) -> Iterator[list[str]]:
    """Yield the cells of each figure of a row, for people; one row without a score."""
    costs = row.overview.costs
    if costs is None:
        yield [*values, "impossible", *[""] * 9]
        return
    begin = [*values, human_count(costs.parameters), range_text(costs.tokens), flops_text(costs.flops)]
    if row.score is None:
        failed = any(x.problem for x in row.seeds)
        yield [*begin, "", "failed" if failed else "", *[""] * 5]
        return
    for i, estimate in enumerate(row.score.estimates):
        each = [estimate_cells(x.score.estimates[i])[1].removesuffix(" %") for x in row.seeds if x.score]
        apart = ["base" if row.is_base else "", "", ""]
        apart = difference_cells(row.differences[i])[3:] if row.differences else apart
        yield [*begin, *estimate_cells(estimate), ", ".join(each), apart[0].removesuffix(" points"), *apart[1:]]


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


def shorten_values(names: Sequence[str], values: Sequence[Values]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return short words for values, where the name of a part tells it from the others, and lines that say the rest.

    Args:
        names: of the dimensions that vary.
        values: of the rows.

    Returns:
        (dimension, value in words) -> short words; and a line for each value that has others.
    """
    words: dict[tuple[str, str], str] = {}
    notes: list[str] = []
    for name in names:
        whole = list(dict.fromkeys(describe_value(x[name]) for x in values))
        short = [x.partition("(")[0] for x in whole]
        for long, brief in zip(whole, short, strict=True):
            is_clear = short.count(brief) == 1
            words[name, long] = brief if is_clear else long
            notes += [f"{brief} is {long}."] if is_clear and brief != long else []
    return words, notes


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


def flops_text(flops: float | None) -> str:
    """Write a number of floating-point operations.

    >>> flops_text(12_345_000_000), flops_text(None)
    ('12.3 G', '')
    """
    if flops is None:
        return ""
    names = iter(("", "k", "M", "G", "T", "P", "E", "Z"))
    name = next(names)
    while flops >= 999.95 and name != "Z":
        flops, name = flops / 1000, next(names)
    return f"{flops:.1f} {name}".strip()


def _name_values(row: Overview, names: Sequence[str], words: Mapping[tuple[str, str], str]) -> list[str]:
    """Return the number of a composition and its values in short words."""
    values = row.candidate.values
    return [str(row.candidate.number), *(words[name, describe_value(values[name])] for name in names)]


def _short(row: Overview, values: list[str]) -> list[str]:
    costs = row.costs
    if costs is None:
        return [*values, "impossible", "", "", "", ""]
    numbers = [human_count(costs.parameters), human_count(costs.trainable)]
    return [*values, *numbers, range_text(costs.tokens), range_text(costs.positions), flops_text(costs.flops)]


def _plain(value: Any) -> Any:
    """Write the least and the most as one cell."""
    return "-".join(map(str, value)) if isinstance(value, list) else value


def _is_number_column(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows]
    return any(cells) and all(not x or x.lstrip("-+~<").strip()[:1].isdigit() for x in cells)
