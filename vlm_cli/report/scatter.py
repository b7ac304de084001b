"""Draw points with intervals as SVG, for a web page: the colours come from the page's style, `.s0` to `.s5`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_cli.report.curves import choose_ticks
from vlm_cli.report.tables import human_count
from vlm_cli.report.web_page import page_text

__all__ = ["COLOURS", "ScatterPoint", "draw_scatter"]

WIDTH, HEIGHT = 480, 260  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 14, 42
RADIUS = 5
COLOURS = 6  # that the page's style has
_FAR = 20.0  # from so many times the least on, the axis is logarithmic


@dataclass(frozen=True)
class ScatterPoint:
    """A point of the drawing.

    Attributes:
        x: its place.
        y: its height.
        interval: from where to where a line goes through it.
        mark: a few characters beside it.
        text: what a reader sees who points at it.
        colour: number of its colour.
    """

    x: float
    y: float
    interval: tuple[float, float]
    mark: str
    text: str
    colour: int = 0


def draw_scatter(title: str, points: Sequence[ScatterPoint], *, x_name: str, y_name: str) -> str:
    """Return a figure with a point for each entry; empty without a point.

    Args:
        title: of the figure.
        points: at most a few dozen can be told apart.
        x_name: what the horizontal axis shows.
        y_name: what the vertical axis shows.
    """
    points = [p for p in points if math.isfinite(p.y) and math.isfinite(p.x)]
    if not points:
        return ""
    lows, highs = [min(p.y, p.interval[0]) for p in points], [max(p.y, p.interval[1]) for p in points]
    rows = choose_ticks(min(lows), max(highs), most=6)
    axis = _Axis.of([p.x for p in points])

    def place(x: float, y: float) -> tuple[float, float]:
        down = (rows[-1] - y) / (rows[-1] - rows[0])
        across = LEFT + (WIDTH - LEFT - RIGHT) * axis.share(x)
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * down, 1)

    grid = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place(points[0].x, y)[1]}" y2="{place(points[0].x, y)[1]}"/>'
        f'<text x="{LEFT - 6}" y="{place(points[0].x, y)[1] + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in rows
    ]
    grid += [
        f'<line x1="{place(x, rows[0])[0]}" x2="{place(x, rows[0])[0]}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{place(x, rows[0])[0]}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(x)}</text>'
        for x in axis.ticks
    ]
    grid.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{page_text(x_name)}</text>')
    drawn = "".join(_draw_point(p, place) for p in points)
    label = page_text(f"{title}: {y_name} against {x_name}")
    return (
        f"<figure>\n<figcaption>{page_text(title)}</figcaption>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<g class="axes">{"".join(grid)}</g>{drawn}</svg>\n</figure>\n'
    )


def _draw_point(point: ScatterPoint, place: object) -> str:
    assert callable(place)
    x, y = place(point.x, point.y)
    (_, low), (_, high) = place(point.x, point.interval[0]), place(point.x, point.interval[1])
    return (
        f'<g class="s{point.colour % COLOURS}"><title>{page_text(point.text)}</title>'
        f'<path d="M{x} {low}V{high}M{x - 4:.1f} {low}h8M{x - 4:.1f} {high}h8"/>'
        f'<circle cx="{x}" cy="{y}" r="{RADIUS}"/>'
        f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{page_text(point.mark)}</text></g>'
    )


@dataclass(frozen=True)
class _Axis:
    """A horizontal axis, linear or logarithmic, with a little room at both ends."""

    low: float
    high: float
    is_log: bool
    ticks: Sequence[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> _Axis:
        least, most = min(values), max(values)
        if least > 0 and most / least >= _FAR:
            low, high = math.log10(least), math.log10(most)
            room = 0.08 * (high - low)
            exponents = range(math.ceil(low - room), math.floor(high + room) + 1)
            return cls(low - room, high + room, True, [10.0**e for e in exponents])
        room = 0.08 * (most - least) or 0.5 * abs(most) or 1.0
        low, high = least - room, most + room
        return cls(low, high, False, [x for x in choose_ticks(low, high, most=5) if low <= x <= high])

    def share(self, x: float) -> float:
        """Return where a value stands: 0 at the left end, 1 at the right one."""
        return ((math.log10(x) if self.is_log else x) - self.low) / (self.high - self.low)


def _short(value: float) -> str:
    """Write a number in few characters.

    >>> _short(16), _short(1_500_000), _short(2.5e12)
    ('16', '1.5 M', '2.5e12')
    """
    if abs(value) >= 1e12:
        digits, _, exponent = f"{value:.2g}".partition("e")
        return f"{digits}e{int(exponent)}" if exponent else digits
    return f"{value:g}" if abs(value) < 1000 else human_count(round(value)).replace(".0 ", " ")
