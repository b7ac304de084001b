"""The data of a trace: what it adds up, finds and writes."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from vlm_cli.report.layout import PromptLayout
from vlm_cli.tracing.trace import Alternative, Gate, HeatMap, LayerShares, Trace, TracedPicture, View, Word, WordToken


@pytest.fixture
def trace() -> Trace:
    tokens = (
        WordToken(7, " r", math.log(0.5), (Alternative(" r", 0.5), Alternative(" b", 0.25))),
        WordToken(8, "ed", math.log(0.25), (Alternative("ed", 0.25),)),
    )
    picture = TracedPicture(
        "a.png", 1, None, None, 20, 10, (View("whole", (-5.0, 0.0, 25.0, 10.0), 2, 3),), Image.new("RGB", (20, 10))
    )
    values = ((0.125, 0.0), (0.3333333, 0.25))
    return Trace(
        model="demo",
        prompt="<image:a.png> a",
        answer=" red",
        words=(Word(" red", tokens),),
        pictures=(picture,),
        maps=(HeatMap(0, 0, "attention", 0.75, (0.75,), values),),
        layout=PromptLayout([], [1, 2], 2, None),
        layers=(LayerShares(0, "layer", (0.25,), ((0.75,),)),),
        gates=(Gate(0, "attn_gate", 0.5),),
        notes=("The language model has no attention.",),
    )


def test_a_word_has_the_probability_of_all_its_tokens(trace: Trace) -> None:
    word = trace.words[0]
    assert math.isclose(word.probability, 0.125)
    assert [x.text for x in word.alternatives] == [" r", " b"]


def test_a_map_is_found_by_word_picture_and_measure(trace: Trace) -> None:
    found = trace.map(0, 0, "attention")
    assert found is not None and found.peak == (1, 0)
    assert trace.map(0, 0, "occlusion") is None
    assert trace.measures == ("attention",)


def test_json_holds_all_but_the_pixels(trace: Trace) -> None:
    found = trace.as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["words"][0]["probability"] == 0.125
    assert found["maps"][0]["values"] == [[0.125, 0.0], [0.3333, 0.25]]
    assert found["pictures"][0] == {
        "name": "a.png",
        "medium": 1,
        "frame": None,
        "seconds": None,
        "width": 20,
        "height": 10,
        "views": [{"kind": "whole", "box": [-5.0, 0.0, 25.0, 10.0], "rows": 2, "columns": 3}],
    }
    assert set(found) == {
        "model", "prompt", "answer", "words", "pictures", "maps", "layout", "layers", "gates", "notes"
    }  # fmt: skip
