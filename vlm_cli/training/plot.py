"""Draw the losses of a run as a picture, with Pillow alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from vlm_cli.report.curves import choose_ticks, smooth

__all__ = ["draw_losses"]

SIZE = (960, 540)  # pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 40, 20, 50  # pixels of margin
_INK, _GRID, _RAW, _MEAN, _EVAL = "#333333", "#e4e4e4", "#b9d3ee", "#1f5fa8", "#d9622b"

_Point: TypeAlias = tuple[float, float]
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_losses(history: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG of the losses over the steps.

    Args:
        history: entries with `step` and `loss` or `eval_loss`, as in `metrics.jsonl`.
        path: the PNG file to write.
        title: a line above the curves.
    """
    train = [(x["step"], x["loss"]) for x in history if "loss" in x]
    held_out = [(x["step"], x["eval_loss"]) for x in history if "eval_loss" in x]
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    draw.text((_LEFT, 10), title, fill=_INK, font=large)
    if train or held_out:
        to_pixels = _draw_axes(draw, [*train, *held_out], small)
        _draw_line(draw, [to_pixels(p) for p in train], _RAW, 1)
        _draw_line(draw, [to_pixels(p) for p in smooth(train)], _MEAN, 3)
        _draw_line(draw, [to_pixels(p) for p in held_out], _EVAL, 2)
        for x, y in map(to_pixels, held_out):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_EVAL)
        _draw_legend(draw, bool(held_out), small)
    image.save(path, optimize=True)


def _draw_axes(draw: ImageDraw.ImageDraw, points: Sequence[_Point], font: _Font) -> Callable[[_Point], _Point]:
    """Draw the grid and its labels; return a function from (step, loss) to pixels."""
    last = max(step for step, _ in points) or 1
    ys = choose_ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    low, high = ys[0], ys[-1]
    width, height = SIZE[0] - _LEFT - _RIGHT, SIZE[1] - _TOP - _BOTTOM

    def to_pixels(point: _Point) -> _Point:
        step, y = point
        return _LEFT + width * step / last, _TOP + height * (high - y) / (high - low)

    for y in ys:
        row = to_pixels((0, y))[1]
        draw.line((_LEFT, row, _LEFT + width, row), fill=_GRID)
        draw.text((_LEFT - 8, row), f"{y:g}", fill=_INK, font=font, anchor="rm")
    for step in choose_ticks(0, last):
        if step <= last:
            column = to_pixels((step, low))[0]
            draw.line((column, _TOP, column, _TOP + height), fill=_GRID)
            draw.text((column, _TOP + height + 8), f"{step:,.0f}", fill=_INK, font=font, anchor="mt")
    draw.text((_LEFT + width / 2, SIZE[1] - 8), "step", fill=_INK, font=font, anchor="mb")
    return to_pixels


def _draw_line(draw: ImageDraw.ImageDraw, points: Sequence[_Point], colour: str, width: int) -> None:
    if len(points) > 1:
        draw.line(list(points), fill=colour, width=width, joint="curve")


def _draw_legend(draw: ImageDraw.ImageDraw, with_eval: bool, font: _Font) -> None:
    entries = [("loss (mean)", _MEAN), ("loss", _RAW), *([("eval loss", _EVAL)] if with_eval else [])]
    right = SIZE[0] - _RIGHT - 10
    for row, (name, colour) in enumerate(entries):
        y = _TOP + 16 + 20 * row
        draw.text((right - 30, y), name, fill=_INK, font=font, anchor="rm")
        draw.line((right - 24, y, right, y), fill=colour, width=3)
