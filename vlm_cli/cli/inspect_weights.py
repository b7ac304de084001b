"""`vlm inspect --weights`: norms, dtypes, dead and exploding rows, and how far parts moved from where they began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm_cli.cli import console
from vlm_cli.cli.progress import ProgressLine

if TYPE_CHECKING:
    from vlm_cli.checkpoint.stored import StoredModel
    from vlm_cli.report.weights import GroupWeights, TensorWeights, WeightReport

__all__ = ["print_weights"]

_MOST_TENSORS = 20  # that the text lists one by one
_HEADS = ("Part and layer", "Norm", "RMS", "Dtype", "Dead", "Exploding", "Moved")


def print_weights(model: StoredModel, times: float, as_json: bool, *, trust_remote_code: bool) -> None:
    """Measure the weights of a model, and print them as a table or as JSON."""
    from vlm_cli.differences.weights import measure_weights

    with ProgressLine(len(model.tensors), noun="tensors", has_summary=False) as line:
        report = measure_weights(
            model, times=times, trust_remote_code=trust_remote_code, progress=lambda done, total: line.show(done)
        )
    if as_json:
        console.print_json(report.to_dict())
        return
    rows = [row for part in report.parts for row in (_row(part), *(_row(layer, "  ") for layer in part.groups))]
    console.print_table(_HEADS, rows, optional=("RMS",))
    _print_starts(report)
    _print_rows(report)


def _row(group: GroupWeights, indent: str = "") -> list[str]:
    return [
        f"{indent}{group.name}",
        f"{group.norm:#.4g}",
        f"{group.rms:#.3g}",
        group.dtype,
        str(group.dead),
        str(group.exploding),
        _moved(group),
    ]


def _moved(group: GroupWeights) -> str:
    """Write how far a group moved: a share of its norm, or nothing if nobody knows."""
    if not group.moved:
        return "" if group.moved is None else "0%"
    if group.moved < 1e-6:
        return "~0%"
    return f"{group.moved:.2%}" if group.moved >= 0.001 else f"{group.moved:.4%}"


def _print_starts(report: WeightReport) -> None:
    """Say what each part is compared with, or why it is not."""
    _print_text("Moved is the norm of the change since the start, as a share of the norm at the start. The start:", 0)
    texts: dict[str, list[str]] = {}
    for part in report.parts:
        place, unknown = part.start["place"], part.start["unknown"]
        text = f"unknown, {unknown}" if place is None else f"{place}, {unknown}" if unknown else place
        texts.setdefault(text, []).append(part.name)
    for text, names in texts.items():
        _print_text(f"{', '.join(names)}: {text}", 2)
    for lacking, reason in report.missing.items():
        _print_text(
            f"The table lacks what the delta directory leaves out of {lacking}, which is not at hand: {reason}", 0
        )


def _print_text(text: str, indent: int) -> None:
    for line in console.wrapped(text, indent):
        console.print_line(line)


def _print_rows(report: WeightReport) -> None:
    """List the tensors with dead or exploding rows."""
    found = [x for part in report.parts for x in part.tensors if x.dead or x.exploding]
    if not found:
        return
    _print_text(
        f"Dead rows hold zeros alone; exploding ones are not finite, or above {report.times:g} times the median norm "
        "of the tensor's rows:",
        0,
    )
    for tensor in found[:_MOST_TENSORS]:
        _print_text(f"{tensor.name}: {', '.join(_describe(tensor))}", 2)
    if len(found) > _MOST_TENSORS:
        _print_text(f"and {len(found) - _MOST_TENSORS} more; --json lists them all", 2)


def _describe(x: TensorWeights) -> Iterator[str]:
    for what, rows in (("dead", x.dead), ("exploding", x.exploding)):
        if rows:
            of = f" of {x.rows}" if x.rows else ""
            shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
            yield f"{len(rows)}{of} {what} ({shown})" if x.rows else "not finite"
