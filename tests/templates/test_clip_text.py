"""The text that a composition puts around clips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlm_cli.composition import GridOptions, TilingOptions
from vlm_cli.errors import CompositionError, MediaError
from vlm_cli.media import ChosenFrames
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.templates.number_words import _SMALL, spell

CLIP, IMAGE = Medium("a.mp4", "video"), Medium("a.png")
CHOSEN = ChosenFrames((0, 14, 29), (0.0, 1.4, 2.9), 3.0)


def written(options: TilingOptions, chosen: ChosenFrames = CHOSEN) -> list[Text | Medium]:
    processor: Any = SimpleNamespace(image_processor=SimpleNamespace(tiling=SimpleNamespace(options=options)))
    return add_clip_texts([Text("a"), CLIP, IMAGE], processor, lambda source: chosen)


def test_times_and_numbers_stand_around_a_clip() -> None:
    options = GridOptions(clip_text="{frames} at {times} of {seconds} s: {views}!")
    text = Text("3 at 0.00, 1.40, 2.90 of 3.00 s: ")
    assert "".join(x.text for x in written(options)[:7] if isinstance(x, Text)) == f"a{text.text}"
    assert written(options)[-3:] == [CLIP, Text("!"), IMAGE]
    assert written(TilingOptions()) == [Text("a"), CLIP, IMAGE]


def test_each_frame_may_have_a_text_of_its_own() -> None:
    options = TilingOptions(
        clip_text="{frames_in_words} frames of {duration}:{views}.",
        frame_text=" {number} at {time} ({seconds}) {image}",
        between_frames_text=";",
    )
    chosen = ChosenFrames((0, 14, 2950), (0.0, 1.4, 3661.9), 3662.5)
    sources = ["a.mp4?frame=0", "a.mp4?frame=14", "a.mp4?frame=2950"]
    parts = written(options, chosen)
    assert [x.source for x in parts if isinstance(x, Medium)] == [*sources, "a.png"]
    text = "".join(x.text if isinstance(x, Text) else "<>" for x in parts)
    assert text == "athree frames of 1:01:02: 1 at 00:00 (0.00) <>; 2 at 00:01 (1.40) <>; 3 at 61:01 (3661.90) <>.<>"
    with pytest.raises(CompositionError, match="between_frames_text needs frame_text"):
        TilingOptions(between_frames_text=";")
    with pytest.raises(CompositionError, match=r"frame_text must hold \{image\} once"):
        TilingOptions(frame_text="{number}")


@pytest.mark.parametrize("number", [0, 13, 20, 64, 100, 115, 340, 1000, 1024, 2300])
def test_numbers_are_spelled(number: int) -> None:
    """Read the words again."""
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    value = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(tens, start=2)}
    total = part = 0
    for word in spell(number).replace("-", " ").replace(",", "").replace(" and ", " ").split():
        if word == "thousand":
            total, part = 1000 * part, 0
        else:
            part = part * 100 if word == "hundred" else part + value[word]
    assert total + part == number


def test_a_folder_of_frames_has_no_times() -> None:
    folder = ChosenFrames((0, 1), None, None)
    assert written(TilingOptions(clip_text="{frames}: {views}"), folder)[1] == Text("2")
    with pytest.raises(MediaError, match=r"no times, but the model's clip_text names \{times\}"):
        written(TilingOptions(clip_text="{times}: {views}"), folder)


def test_a_text_without_its_clip_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"clip_text must hold \{views\} once"):
        TilingOptions(clip_text="{times}")
    with pytest.raises(CompositionError, match=r"clip_text names \{minutes\}.*Known: .*\{times\}"):
        TilingOptions(clip_text="{views}{minutes}")
