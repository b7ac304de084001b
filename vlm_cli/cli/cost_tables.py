"""The tables of `vlm cost`: rows of texts for people, and of numbers for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlm_cli.cli import console
from vlm_cli.report.tables import human_bytes, human_flops

if TYPE_CHECKING:
    from vlm_cli.costs.subjects import Cost, Subject
    from vlm_cli.costs.workload import Workload

__all__ = ["csv_text", "print_tables", "show_seconds"]

Counted = Sequence[tuple["Subject", Sequence["Cost"]]]


def print_tables(counted: Counted) -> None:
    """Print what each workload costs each subject: operations, bytes, and training and seconds if they were counted."""
    several = len(counted) > 1
    costs = [(subject, cost) for rows in zip(*(costs for _, costs in counted), strict=True)
             for (subject, _), cost in zip(counted, rows, strict=True)]  # fmt: skip
    names = [[subject.name] if several else [] for subject, _ in costs]
    place_heads, places = _places([cost.prompt.workload for _, cost in costs])
    heads = [*(["model"] if several else []), *place_heads]

    def show(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], optional: Sequence[str] = ()) -> None:
        rows = [[*name, *place, *cell] for name, place, cell in zip(names, places, cells, strict=True)]
        console.print_table([*heads, *columns], rows, title=title, optional=optional)

    show("Operations (FLOPs)", *_operations([cost for _, cost in costs]), optional=["tokenizer", "encoder"])
    show("Memory", *_memory([cost for _, cost in costs]), optional=["activations", "media", "cache"])
    if any(cost.step is not None for _, cost in costs):
        show("A step of training", *_training([cost for _, cost in costs]), optional=["weights", "gradients", "states"])
    card = counted[0][0].card
    if card is not None:
        show(f"Estimated seconds on {card.name}", *_seconds([cost for _, cost in costs]))


def _places(workloads: Sequence[Workload]) -> tuple[list[str], list[list[str]]]:
    """Name the workloads by their sizes; sizes that none of them has get no column."""
    shown: dict[str, Callable[[Workload], str]] = {"pictures": lambda x: str(x.pictures)}
    if workloads[0].size is not None:
        shown["size"] = lambda x: "" if x.size is None else f"{x.size[0]}x{x.size[1]}"
    if workloads[0].tiles is not None:
        shown["tiles"] = lambda x: str(x.tiles)
    if any(x.frames > 1 for x in workloads):
        shown["frames"] = lambda x: str(x.frames)
    shown["text"] = lambda x: str(x.text)
    return list(shown), [[show(x) for show in shown.values()] for x in workloads]


def _operations(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    columns = ["positions", "encoder", "tokenizer", "prefill", "token"]
    return columns, [
        [
            str(cost.prompt.positions),
            *(
                human_flops(x)
                for x in (
                    cost.prompt.flops.encoder,
                    cost.prompt.flops.tokenizer,
                    cost.prompt.flops.fusion + cost.prompt.flops.prefill,
                    cost.prompt.flops.decode,
                )
            ),
        ]
        for cost in costs
    ]


def _memory(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    columns = ["weights", "cache", "media", "activations", "peak"]
    return columns, [
        [*map(human_bytes, (x.weight_bytes, x.cache_bytes, x.media_bytes, x.activation_bytes, x.peak_bytes))]
        for x in (cost.prompt for cost in costs)
    ]


def _training(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    columns = ["FLOPs", "weights", "gradients", "states", "activations", "peak"]
    rows = []
    for cost in costs:
        assert cost.step is not None
        memory = cost.step.memory
        parts = (memory.weights, memory.gradients, memory.states, memory.activations, memory.peak)
        rows.append([human_flops(cost.step.flops), *map(human_bytes, parts)])
    return columns, rows


def _seconds(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    columns = ["first token", "next token", "tokens/s"]
    trains = any(cost.step is not None for cost in costs)
    rows = []
    for cost in costs:
        assert cost.first_seconds is not None and cost.token_seconds is not None
        speed = cost.prompt.workload.rows / cost.token_seconds
        cells = [show_seconds(cost.first_seconds), show_seconds(cost.token_seconds), f"{speed:.4g}"]
        rows.append([*cells, *([show_seconds(cost.step.seconds or 0)] if cost.step is not None else [])])
    return [*columns, *(["training step"] if trains else [])], rows


def show_seconds(seconds: float) -> str:
    """Write a time with three digits.

    >>> show_seconds(0.01234), show_seconds(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def csv_text(counted: Counted) -> str:
    """Write every number of every row, a line for each model and workload."""
    rows = [{"model": subject.name, **_flatten(cost.to_dict())} for subject, costs in counted for cost in costs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flatten(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Join the names of nested values: {"flops": {"total": 3}} -> {"flops_total": 3}."""
    found: dict[str, Any] = {}
    for name, x in values.items():
        if isinstance(x, dict):
            found |= _flatten(x, f"{before}{name}_")
        else:
            found[before + name] = f"{x[0]}x{x[1]}" if isinstance(x, (list, tuple)) else x
    return found
