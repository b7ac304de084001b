"""Draw curves as SVG, for a web page: the colours come from the page's style, `.s0` to `.s5`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from vlm_cli.report.web_page import page_text

__all__ = ["choose_ticks", "draw_curves", "smooth"]

WIDTH, HEIGHT = 480, 220  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 26
MOST_POINTS = 400  # of a curve; the mean of neighbours stands for them
MOST_CURVES = 6  # that have a colour

Point: TypeAlias = tuple[float, float]


def draw_curves(title: str, curves: Mapping[str, Sequence[Point]], *, unit: str = "", from_zero: bool = True) -> str:
    """Return a figure with curves over the steps; empty without a point.

    Args:
        title: of the figure.
        curves: name -> points (step, value); a curve whose name begins with `·` is drawn thin, and has no legend.
        unit: of the values, for the figure's title.
        from_zero: let the axis of the values begin at 0.
    """
    found = {name: _thin([p for p in points if math.isfinite(p[1])]) for name, points in curves.items()}
    found = {name: points for name, points in found.items() if points}
    if not found:
        return ""
    points = [p for some in found.values() for p in some]
    last = max(step for step, _ in points) or 1
    lowest = min(y for _, y in points)
    ticks = choose_ticks(min(0.0, lowest) if from_zero else lowest, max(y for _, y in points), most=5)
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last
        return round(x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low), 1)

    parts = [_axes(ticks, last, place)]
    names = [name for name in found if not name.startswith("·")]
    for name, some in found.items():
        colour = names.index(name) % MOST_CURVES if name in names else 0
        kind = f"s{colour}" + ("" if name in names else " raw")
        placed = [place(p) for p in some]
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
        if len(placed) <= 40 and name in names:
            parts += [f'<circle class="{kind}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in placed]
    legend = "".join(
        f'<span class="s{i % MOST_CURVES}">{page_text(name)} {_number(found[name][-1][1])}</span>'
        for i, name in enumerate(names)
    )
    label = f"{title}{f' ({unit})' if unit else ''}"
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{page_text(label)}">{"".join(parts)}</svg>'
    return f"<figure>\n<figcaption>{page_text(label)}<span>{legend}</span></figcaption>\n{drawing}\n</figure>\n"


def _axes(ticks: Sequence[float], last: float, place: Callable[[Point], Point]) -> str:
    """Draw the grid and its labels; `place` turns (step, value) into a place of the drawing."""
    rows = [(y, place((0, y))[1]) for y in ticks]
    steps = [x for x in choose_ticks(0, last, most=6) if x <= last and x == int(x)]
    columns = [(x, place((x, ticks[0]))) for x in steps]
    lines = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row}" y2="{row}"/>'
        f'<text x="{LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{_number(y)}</text>'
        for y, row in rows
    ]
    lines += [
        f'<text x="{column}" y="{bottom + 18:.1f}" text-anchor="middle">{x:,.0f}</text>'
        for x, (column, bottom) in columns
    ]
    return f'<g class="axes">{"".join(lines)}</g>'


def _number(value: float) -> str:
    """Write a number in few characters.

    >>> [_number(x) for x in (0, 0.00025, 0.123456, 41.26, 12345.6)]
    ['0', '2.5e-4', '0.123', '41.3', '12,346']
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 0.001:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def _thin(points: Sequence[Point]) -> list[Point]:
    """Return at most `MOST_POINTS` points: means of neighbours, and the last one."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def choose_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Choose round numbers that span a range.

    >>> choose_ticks(0, 3.7)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    """
    size = (high - low) / most or 1.0
    unit = 10 ** math.floor(math.log10(size))
    unit *= next(m for m in (1, 2, 5, 10) if m * unit >= size)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(i * unit, 12) for i in range(first, max(last, first + 1) + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Smooth a curve: the running mean over a tenth of the points."""
    half = len(points) // 20
    losses = [y for _, y in points]
    sums = [0.0]
    for y in losses:
        sums.append(sums[-1] + y)
    spans = [(max(0, i - half), min(len(losses), i + half + 1)) for i in range(len(losses))]
    return [(points[i][0], (sums[b] - sums[a]) / (b - a)) for i, (a, b) in enumerate(spans)]
