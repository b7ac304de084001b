"""A trace as a PNG: colours where values are, and a size that a viewer opens."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlm_cli.report.layout import PromptLayout
from vlm_cli.tracing.png import draw_trace, overlay
from vlm_cli.tracing.trace import MEASURES, HeatMap, Trace, TracedPicture, View, Word, WordToken


def heat(word: int = 0, picture: int = 0, measure: str = "occlusion") -> HeatMap:
    return HeatMap(word, picture, measure, 2.0, (2.0,), ((2.0, 0.0), (0.0, -2.0)))


def test_colours_lie_where_the_values_are() -> None:
    found = np.asarray(overlay(Image.new("RGB", (40, 40), "grey"), heat(), 2.0)).astype(int)
    red, blue = found[..., 0] - found[..., 2], found[..., 2] - found[..., 0]
    assert red[:10, :10].min() > 80 and blue[30:, 30:].min() > 80
    assert abs(red[3, 36]) < 20


@pytest.mark.parametrize("size", [(3, 2000), (2000, 3), (1, 1)])
def test_a_thin_picture_and_a_name_of_two_lines_are_drawn(size: tuple[int, int]) -> None:
    views = (View("whole", (0, 0, *size), 2, 2),)
    picture = TracedPicture("a\nb.png", 1, None, None, *size, views, Image.new("RGB", size))
    word = Word(" cat", (WordToken(1, " cat", -0.1, ()),))
    trace = Trace(
        "m", "p", "a", (word,), (picture,), (heat(), heat(measure="attention")), PromptLayout([], [], 0, None)
    )
    with Image.open(io.BytesIO(draw_trace(trace))) as sheet:
        assert sheet.height > 128


@pytest.mark.sample(1)
@pytest.mark.parametrize(("num_words", "num_pictures"), [(2, 1), (100, 8)])
def test_a_sheet_has_a_row_for_each_word(num_words: int, num_pictures: int) -> None:
    picture = TracedPicture(
        "a.png", 1, None, None, 20, 10, (View("whole", (0, 0, 20, 10), 2, 2),), Image.new("RGB", (20, 10))
    )
    words = tuple(Word(f" wörd{i}", (WordToken(i, f" wörd{i}", -0.1, ()),)) for i in range(num_words))
    maps = tuple(
        heat(word, shown, measure) for word in range(num_words) for shown in range(num_pictures) for measure in MEASURES
    )
    trace = Trace("m", "p", "a", words, (picture,) * num_pictures, maps, PromptLayout([], [], 0, None))
    with Image.open(io.BytesIO(draw_trace(trace))) as sheet:
        assert sheet.width * sheet.height < 2**24 and max(sheet.size) < 16_384
        assert sheet.height > num_words * 32
