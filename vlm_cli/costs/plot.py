"""Curves of costs over the text, or over the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlm_cli.costs.subjects import Cost, Subject
from vlm_cli.printable import count_of
from vlm_cli.report.plots import Panel, draw_panels

__all__ = ["draw_costs"]


def draw_costs(path: Path, counted: Sequence[tuple[Subject, Sequence[Cost]]], *, overwrite: bool = False) -> None:
    """Write a picture: operations, memory, and seconds and training if they were counted.

    Args:
        path: the file, .svg or .png.
        counted: subjects, and what each workload costs them; the workloads differ in their text or in their pictures.
        overwrite: replace the file.

    Raises:
        VLMError: if the file cannot be written.
    """
    first = [cost.prompt.workload for cost in counted[0][1]]
    over_text = len({x.text for x in first}) > 1
    measures: dict[str, Callable[[Cost], float]] = {
        "until the first token, TFLOPs": lambda x: x.prompt.flops.total / 1e12,
        "one token, GFLOPs": lambda x: x.prompt.flops.decode / 1e9,
        "memory at the peak, GB": lambda x: x.prompt.peak_bytes / 1e9,
    }
    if counted[0][0].card is not None:
        measures["until the first token, s (estimated)"] = lambda x: x.first_seconds or 0.0
    if counted[0][1][0].step is not None:
        measures["step of training, TFLOPs"] = lambda x: 0.0 if x.step is None else x.step.flops / 1e12
        measures["memory of training, GB"] = lambda x: 0.0 if x.step is None else x.step.memory.peak / 1e9
    panels = [Panel(name, _curves(counted, measure, over_text)) for name, measure in measures.items()]
    draw_panels(
        path,
        panels,
        x="tokens of text" if over_text else "pictures",
        title=" and ".join(subject.name for subject, _ in counted),
        overwrite=overwrite,
    )


def _curves(
    counted: Sequence[tuple[Subject, Sequence[Cost]]], measure: Callable[[Cost], float], over_text: bool
) -> dict[str, list[tuple[float, float]]]:
    """Group the points of each subject by what is not on the axis."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for subject, costs in counted:
        for cost in costs:
            work = cost.prompt.workload
            view = (
                f", {work.size[0]}x{work.size[1]}"
                if work.size
                else f", {count_of(work.tiles, 'tile')}"
                if work.tiles
                else ""
            )
            view += f", {work.frames} frames" if work.frames > 1 else ""
            other = count_of(work.pictures, "picture") if over_text else count_of(work.text, "token")
            x = work.text if over_text else work.pictures
            curves.setdefault(f"{subject.name}, {other}{view}", []).append((x, measure(cost)))
    return {name: sorted(points) for name, points in curves.items()}
