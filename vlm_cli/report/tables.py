"""Reports as rows of text, for the terminal and for Markdown. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vlm_cli.printable import markdown_text

if TYPE_CHECKING:
    from vlm_cli.report.parameters import ParameterReport, ParameterRow

__all__ = [
    "OPTIONAL_HEADS",
    "human_bytes",
    "human_count",
    "human_flops",
    "parameter_heads",
    "parameter_rows",
    "parameters_markdown",
]


#: Columns that a narrow table of parameters does without, the least important one first.
OPTIONAL_HEADS = ("Frozen", "Share", "Trainable")


def human_bytes(size: float) -> str:
    """Write a number of bytes with a unit.

    >>> human_bytes(5_400_000)
    '5.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_count(number: int) -> str:
    """Write a number with four digits at most.

    >>> human_count(428_311_552), human_count(999_960), human_count(768)
    ('428.3 M', '1.0 M', '768')
    """
    if number < 1000:
        return str(number)
    size = 1000
    for unit in ("k", "M"):
        if round(number / size, 1) < 1000:
            return f"{number / size:.1f} {unit}"
        size *= 1000
    return f"{number / size:.1f} B"


def human_flops(number: float) -> str:
    """Write a number of floating-point operations with a unit.

    >>> human_flops(4_695_500_000_000), human_flops(640)
    ('4.7 T', '640')
    """
    for unit in ("", "k", "M", "G", "T"):
        if round(number, 1) < 1000:
            return f"{number:.1f} {unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.1f} P"


def parameter_heads(report: ParameterReport) -> tuple[str, ...]:
    """Return the column heads of a table of parameters."""
    return ("Part", "Parameters", "Trainable", "Frozen", "Share", f"Bytes ({report.dtype})")


def parameter_rows(report: ParameterReport, *, short: bool = False) -> list[list[str]]:
    """Return the rows of a table of parameters, the total last. Modules inside a part are indented.

    Args:
        report: what was counted.
        short: write numbers as 428.3 M.
    """
    return [_cells(row, short=short) for row in _rows(report)]


def parameters_markdown(report: ParameterReport) -> str:
    """Write a table of parameters in Markdown."""
    lines = ["| part | parameters | trainable | frozen | share | bytes |", "|---|--:|--:|--:|--:|--:|"]
    for row in _rows(report):
        name, *cells = _cells(row)
        lines.append(f"| {'&nbsp;' * (2 * row.depth - 2)}{markdown_text(name.strip())} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(report: ParameterReport) -> Iterator[ParameterRow]:
    """Yield the rows and the total. After a part that has an adapter stands what the adapter holds of it."""
    for row in (*report.rows, report.total):
        yield row
        if row.adapter and row.depth == 1 and row is not report.total:
            share, size = row.share * row.adapter / row.parameters, row.bytes * row.adapter // row.parameters
            yield replace(
                row,
                name="adapter",
                depth=2,
                parameters=row.adapter,
                trainable=row.adapter,
                frozen=0,
                share=share,
                bytes=size,
            )


def _cells(row: ParameterRow, *, short: bool = False) -> list[str]:
    name = "  " * (row.depth - 1) + (row.name.rpartition(".")[2] if row.depth > 1 else row.name)
    counts = [human_count(x) if short else f"{x:,}" for x in (row.parameters, row.trainable, row.frozen)]
    return [name, *counts, f"{100 * row.share:.1f}%", human_bytes(row.bytes)]
