"""A trace as one picture: a row for each word, and its heat maps over the pictures of the prompt."""

from __future__ import annotations

import io
from math import isqrt
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_cli.printable import escape_controls
from vlm_cli.tracing.trace import HeatMap, Measure, Trace

__all__ = ["draw_trace", "overlay"]

_MOST_SIDE, _MOST_PIXELS = 16_000, 2**23  # of the sheet, so that it is written in seconds and opens anywhere
_TILE, _SMALLEST_TILE = 128, 32  # pixels of a picture's longer side
_GAP, _HEAD, _NAME = 8, 44, 150  # pixels between pictures, above them, and for a word
_INK, _QUIET = "#222222", "#777777"
_MORE, _LESS = (220, 40, 30), (30, 90, 210)  # colours of what makes a word likelier, and less likely
_OPACITY = 0.75  # of the largest value
_TITLES: dict[Measure, str] = {"attention": "attention", "occlusion": "fall if blanked"}

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_trace(trace: Trace) -> bytes:
    """Draw a trace as a PNG. Pictures are smaller where there are many of them.

    Each word has one scale for all its maps of a measure, so that a pale picture matters less than a strong one.
    """
    words = [i for i, word in enumerate(trace.words) if word.text.strip()]
    columns = [(picture, measure) for picture in range(len(trace.pictures)) for measure in trace.measures]
    tile = _choose_tile(len(words), len(columns))
    size = (_NAME + len(columns) * (tile + _GAP) + _GAP, _HEAD + len(words) * (tile + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(11)
    for column, (picture, measure) in enumerate(columns):
        left = _NAME + column * (tile + _GAP)
        _write(draw, (left, 6), _name_picture(trace, picture), tile, _INK, small)
        _write(draw, (left, 22), _TITLES[measure], tile, _QUIET, small)
    for row, word in enumerate(words):
        top = _HEAD + row * (tile + _GAP)
        _write(draw, (_GAP, top), trace.words[word].text.strip(), _NAME - 2 * _GAP, _INK, font)
        _write(draw, (_GAP, top + 20), f"{trace.words[word].probability:.1%}", _NAME - 2 * _GAP, _QUIET, small)
        for column, (picture, measure) in enumerate(columns):
            found = trace.map(word, picture, measure)
            assert found is not None
            image = _fit(trace.pictures[picture].image, tile)
            shown = overlay(image, found, trace.scale(word, measure))
            sheet.paste(shown, (_NAME + column * (tile + _GAP), top))
    data = io.BytesIO()
    sheet.save(data, "PNG", compress_level=3)
    return data.getvalue()


def _choose_tile(num_words: int, num_columns: int) -> int:
    """Choose the pixels of a picture's longer side, so that the sheet is not too large to open."""
    rows = (_MOST_SIDE - _HEAD) // max(1, num_words) - _GAP
    columns = (_MOST_SIDE - _NAME) // max(1, num_columns) - _GAP
    area = isqrt(_MOST_PIXELS // max(1, num_words * num_columns))
    return max(_SMALLEST_TILE, min(_TILE, rows, columns, area))


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scale a picture so that its longer side has `side` pixels; the shorter one keeps at least one."""
    scale = side / max(image.size)
    width, height = (max(1, round(x * scale)) for x in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _name_picture(trace: Trace, picture: int) -> str:
    found = trace.pictures[picture]
    name = f"{picture + 1}: {found.name.rsplit('/', 1)[-1]}"
    return name if found.seconds is None else f"{name} {found.seconds:.2f} s"


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, color: str, font: _Font) -> None:
    """Write a text on one line, cut to a width in pixels."""
    shown = text = escape_controls(text)
    while shown and draw.textlength(shown, font) > width:
        text = text[:-1]
        shown = f"{text}…" if text else ""
    draw.text(at, shown, color, font)


def overlay(image: Image.Image, found: HeatMap, scale: float) -> Image.Image:
    """Lay a heat map over a picture made pale: red where the word comes from, blue where it becomes likelier without.

    Args:
        image: RGB, of any size.
        found: the map.
        scale: the value that gets the full colour.
    """
    values = np.asarray(found.values, np.float32) / scale
    smooth = Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC)
    strength = np.asarray(smooth, np.float32).clip(-1, 1)[..., None]
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32) * 0.6 + 255 * 0.4
    color = np.where(strength > 0, np.array(_MORE, np.float32), np.array(_LESS, np.float32))
    share = _OPACITY * np.abs(strength)
    return Image.fromarray((grey * (1 - share) + color * share).round().astype(np.uint8))
