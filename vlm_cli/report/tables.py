"""Reports as rows of text, for the terminal and for Markdown. Importing this module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_cli.printable import markdown_text

if TYPE_CHECKING:
    from vlm_cli.report.parameters import ParameterReport, ParameterRow

__all__ = ["human_bytes", "parameter_heads", "parameter_rows", "parameters_markdown"]


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


def parameter_heads(report: ParameterReport) -> tuple[str, ...]:
    """Return the column heads of a table of parameters."""
    return ("Part", "Parameters", "Trainable", "Frozen", "Share", f"Bytes ({report.dtype})")


def parameter_rows(report: ParameterReport) -> list[list[str]]:
    """Return the rows of a table of parameters, the total last. Modules inside a part are indented."""
    return [_cells(row) for row in (*report.rows, report.total)]


def parameters_markdown(report: ParameterReport) -> str:
    """Write a table of parameters in Markdown."""
    lines = ["| part | parameters | trainable | frozen | share | bytes |", "|---|--:|--:|--:|--:|--:|"]
    for row in (*report.rows, report.total):
        name, *cells = _cells(row)
        lines.append(f"| {'&nbsp;' * (2 * row.depth - 2)}{markdown_text(name.strip())} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: ParameterRow) -> list[str]:
    name = "  " * (row.depth - 1) + (row.name.rpartition(".")[2] if row.depth > 1 else row.name)
    counts = [f"{x:,}" for x in (row.parameters, row.trainable, row.frozen)]
    return [name, *counts, f"{100 * row.share:.1f}%", human_bytes(row.bytes)]
