"""The text that a composition puts around clips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlm_cli.composition import GridOptions, TilingOptions
from vlm_cli.errors import CompositionError, MediaError
from vlm_cli.media import ChosenFrames
from vlm_cli.prompt import Medium, Text
from vlm_cli.writing.clip_text import add_clip_texts

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
