"""Which things the words of an answer speak of, where these lie, and that the demo's maps lie there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples.scenes import trace
from examples.scenes.draw import coverage
from examples.scenes.world import Background, Scene, Thing


def thing(color: str, shape: str, x: float = 20.0, y: float = 40.0) -> Thing:
    return Thing(shape, color, "small", x, y, 6.0, 0.0, (255, 0, 0))


def scene(*things: Thing) -> Scene:
    return Scene(things, Background(((0, 0, 0), (9, 9, 9)), 0.0, 0, 0))


def test_a_thing_is_found_by_what_an_answer_says_of_it() -> None:
    cross, heart = thing("yellow", "cross"), thing("red", "heart")
    first, second = ["a", "small", "yellow", "cross", "above"], ["a", "small", "red", "heart", "and"]
    words = [*first, *second, "a", "large", "red", "star", "."]
    assert list(trace.find_things(words, scene(cross, heart))) == [(2, cross), (7, heart)]
    assert list(trace.find_things(words, scene(cross, heart, thing("red", "heart", 50.0)))) == [(2, cross)]


def test_cells_lie_on_the_thing() -> None:
    (covered,) = coverage(scene(thing("red", "square")))
    on_thing = trace.lies_on(covered, 8, 8)
    for row in range(8):
        for column in range(8):
            cell = covered[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert on_thing[row, column] == (cell.mean() >= 0.12)
    assert on_thing[4, 2] and 2 <= on_thing.sum() <= 6
    assert not trace.lies_on(np.zeros((64, 64)), 4, 4).any()


@pytest.mark.matrix
def test_the_peaks_of_some_captions(capsys: pytest.CaptureFixture[str]) -> None:
    trace.main(["--scenes", "2", "--json"])
    shares = {(x["measure"], x["kind"]): x for x in json.loads(capsys.readouterr().out)}
    both = shares["occlusion", "both"]
    assert both["words"] >= 4 and both["right"] / both["words"] > 0.5 > 3 * both["chance"]


@pytest.mark.matrix
def test_the_peaks_of_many_captions() -> None:
    results = trace.measure_scenes(trace.load_plan("demo"), 60, seed=1)
    found = {(x.measure, x.kind): x for x in trace.summarise(results)}
    assert found["occlusion", "both"].right >= 0.8 * found["occlusion", "both"].words
    assert found["attention", "both"].right >= 0.7 * found["attention", "both"].words
