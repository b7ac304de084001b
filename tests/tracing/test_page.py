"""The page of a trace: what it holds, that nothing in a trace becomes markup, and what it does in Chromium."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import CHROMIUM, browsing
from vlm_cli.report.layout import PromptLayout, Span
from vlm_cli.tracing.page import make_page
from vlm_cli.tracing.trace import Alternative, Gate, HeatMap, LayerShares, Trace, TracedPicture, View, Word, WordToken

EVIL = "</script><script>alert('&')</script><!--\"><img src=http://x onerror=y>\0\u2028"
VOID = {"meta", "img", "br", "input", "rect", "line", "polyline", "circle"}
MEASURES = ("attention", "occlusion")


def make_trace(words=("a", " red", " cat"), sizes=((60, 40),), cells=(4, 6), *, layers=3, tiles=0, image=None, **facts):
    """A trace of random numbers."""
    draw = random.Random(5)
    made = tuple(
        Word(
            x,
            (WordToken(i, x, math.log(0.05 + 0.9 * draw.random()), (Alternative(f"{x}?", 0.3), Alternative(x, 0.2))),),
        )
        for i, x in enumerate(words)
    )
    name = facts.pop("name", "a.png")
    tile_views = [View("tile", (10 * i, 0, 10 * i + 10, 40), 2, 2) for i in range(tiles)]
    views = (*tile_views, View("whole", (0, 0, 60, 40), 4, 6))
    pictures = tuple(
        TracedPicture(name, i + 1, None, None, *size, views, image or Image.new("RGB", size, "navy"))
        for i, size in enumerate(sizes)
    )
    rows, columns = cells

    def values(low):
        return tuple(tuple(draw.uniform(low, 1) for _ in range(columns)) for _ in range(rows))

    places = [(w, p, m) for m in MEASURES for w in range(len(words)) for p in range(len(sizes))]
    maps = tuple(HeatMap(w, p, m, draw.random(), (), values(-1 if m == "occlusion" else 0)) for w, p, m in places)
    text = tuple(draw.random() for _ in words)
    shares = tuple(tuple((1 - x) / len(sizes) for _ in sizes) for x in text)
    found = [LayerShares(i, kind, text, shares) for i in range(layers) for kind in ("block", "layer")]
    spans = [
        Span("medium", name, 1, 0, 5, [1], vision_tokens=5),
        Span("text", facts.get("prompt", "What?"), 3, 5, 8, [1]),
    ]
    return Trace(
        **{"model": "demo", "prompt": "<image:a.png>What?", "notes": ("A note.",), **facts},
        answer="".join(words),
        words=made,
        pictures=pictures,
        maps=maps,
        layout=PromptLayout(spans, [1, 2, 3, 4], 8, 100),
        layers=tuple(found),
        gates=tuple(Gate(i, kind, draw.random()) for i in range(layers) for kind in ("attn_gate", "ff_gate")),
    )


class Parsed(HTMLParser):
    """What a browser makes of a page: well-formed, or it fails."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page.decode())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def data(self):
        return json.loads(next(text for tag, text in self.texts if tag == "script"))


def test_nothing_in_a_trace_becomes_markup():
    plain = Parsed(make_page(make_trace()))
    hostile = make_trace((EVIL, f" {EVIL}", "\n"), name=EVIL, model=EVIL, prompt=EVIL, notes=(EVIL,))
    found = Parsed(make_page(hostile))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert {name for _, attrs in found.tags for name in attrs} == {name for _, attrs in plain.tags for name in attrs}
    assert (
        found.data["words"][0]["text"] == EVIL
        and found.data["words"][0]["tokens"][0]["alternatives"][0][0] == f"{EVIL}?"
    )
    assert [attrs["src"][:10] for tag, attrs in found.tags if tag == "img"] == ["data:image"]


def test_the_page_runs_its_own_script_alone():
    found = Parsed(make_page(make_trace()))
    script = [text for tag, text in found.texts if tag == "script"][-1]
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(key.startswith("on") or key == "href" for _, attrs in found.tags for key in attrs)


def unpack(trace, measure):
    """The maps of a page, as numbers, by word and picture."""
    data = Parsed(make_page(trace)).data["measures"][measure]
    cells, start, found = np.frombuffer(base64.b64decode(data["cells"]), np.uint8), 0, {}
    for word, scale in enumerate(data["scales"]):
        for picture, (rows, columns) in enumerate(data["grids"]):
            piece = cells[start : start + rows * columns].reshape(rows, columns)
            found[word, picture] = (piece.astype(float) - 127) / 127 * scale
            start += rows * columns
    assert start == len(cells)
    return found


@pytest.mark.parametrize("measure", MEASURES)
def test_the_page_holds_the_maps(measure):
    trace = make_trace(sizes=((60, 40), (40, 60)))
    found = unpack(trace, measure)
    assert len(found) == 6
    for (word, picture), values in found.items():
        true = np.asarray(trace.map(word, picture, measure).values)
        assert abs(values - true).max() <= trace.scale(word, measure) / 250
    assert abs(found[0, 0] - found[1, 0]).max() > 0.1  # the twin: maps differ


def test_the_page_holds_the_shares_of_each_layer():
    trace = make_trace(sizes=((60, 40), (40, 60)))
    for packed, layer in zip(Parsed(make_page(trace)).data["layers"], trace.layers, strict=True):
        shares = np.frombuffer(base64.b64decode(packed["shares"]), np.uint8).reshape(3, 3) / 255
        true = np.column_stack([layer.text, layer.pictures])
        assert abs(shares - true).max() < 0.003 and (packed["layer"], packed["kind"]) == (layer.layer, layer.kind)


@pytest.mark.matrix
def test_many_pictures_and_words_make_no_large_page():
    photo = Image.effect_noise((1600, 1200), 80).convert("RGB")
    words = tuple(f" word{i}" for i in range(100))
    page = make_page(make_trace(words, ((1600, 1200),) * 8, (24, 32), layers=32, image=photo))
    assert len(page) < 5_000_000 and len(re.findall(b"data-word=", page)) == 100


def test_maps_of_many_cells_are_averaged(monkeypatch):
    trace = make_trace(cells=(5, 7))
    monkeypatch.setattr("vlm_cli.tracing.page._MOST_CELLS", 9 * len(trace.maps))
    true = np.asarray(trace.map(1, 0, "attention").values)
    found = unpack(trace, "attention")[1, 0]
    assert found.shape == (2, 3)
    slow = [[true[r : r + 3, c : c + 3].mean() for c in (0, 3, 6)] for r in (0, 3)]
    assert abs(found - np.asarray(slow)).max() < trace.scale(1, "attention") / 250


def test_a_trace_without_maps_and_layers_is_a_page():
    trace = make_trace(layers=0)
    bare = Parsed(make_page(Trace(**{**vars_of(trace), "maps": (), "gates": ()})))
    assert bare.data["measures"] == {} and bare.data["layers"] == []


def vars_of(trace):
    return {name: getattr(trace, name) for name in trace.__dataclass_fields__}


# -- in a browser ------------------------------------------------------------------------------------------------------

chromium = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def show(browser, tmp_path):
    """Open the page of a trace; it may complain of nothing."""

    def open_page(trace, width=1280, *, dark=False):
        file = tmp_path / "trace.html"
        file.write_bytes(make_page(trace))
        browser.resize(width, 900, dark=dark)
        browser.open(file.as_uri())
        return browser

    yield open_page
    assert browser.complaints == []


MAP = "document.querySelector('canvas').toDataURL()"
POINT = "document.querySelectorAll('[data-word]')[{}].dispatchEvent(new MouseEvent('{}'))"


@pytest.mark.matrix
@chromium
def test_a_word_shows_its_maps(show):
    page = show(make_trace())
    first = page.find(MAP)
    page.find(POINT.format(1, "mouseenter"))
    second = page.find(MAP)
    assert first != second and page.find("document.querySelector('#word').textContent").startswith("“red”")
    page.find("document.querySelector('#answer').dispatchEvent(new MouseEvent('mouseleave'))")
    assert page.find(MAP) == first  # back to the word that is kept
    page.find("document.querySelectorAll('[data-word]')[1].focus()")  # by the keyboard
    assert page.find(MAP) == second
    page.press("Tab")
    assert page.find("document.activeElement.dataset.word") == "2" and page.find(MAP) not in (first, second)
    page.press("Enter")
    assert page.find("[...document.querySelectorAll('[aria-pressed=true]')].map(x => x.dataset.word)") == ["2"]
    page.find("document.querySelector('[value=occlusion]').click()")
    assert page.find(MAP) not in (first, second)


@pytest.mark.matrix
@chromium
def test_the_peak_of_a_map_is_where_it_belongs(show):
    trace = make_trace(cells=(4, 6))
    page = show(trace)
    page.find("globalThis.canvas = document.querySelector('canvas'); 0")
    width, height = page.find("[canvas.width, canvas.height]")
    pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
    strength = page.find(f"[...{pixels}.filter((_, i) => i % 4 === 3)]")
    table = np.asarray(strength).reshape(height, width)
    row, column = (int(x) for x in np.unravel_index(table.argmax(), table.shape))
    assert (row * 4 // height, column * 6 // width) == trace.map(0, 0, "attention").peak
    assert abs(width / height - 1.5) < 0.02


@pytest.mark.matrix
@chromium
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_is_readable(show, width, dark):
    words = (*(f" word{i}" for i in range(98)), " " + "long" * 80, " end.")
    sizes = ((60, 40), (40, 60), (1, 1), (3, 1000), (1000, 3), (640, 480), (32, 32), (64, 64))
    page = show(make_trace(words, sizes, tiles=2, prompt="x" * 500), width, dark=dark)
    assert page.find("document.documentElement.scrollWidth <= innerWidth")
    ratios = page.find("[...document.querySelectorAll('.frame')].map(x => x.clientWidth / x.clientHeight)")
    assert all(abs(found / (w / h) - 1) < 0.1 for found, (w, h) in zip(ratios, sizes, strict=True) if 0.1 < w / h < 10)
    shown = Image.open(io.BytesIO(page.picture())).convert("L")
    assert (shown.getpixel((2, 2)) < 60) == dark
    assert shown.getextrema()[1] - shown.getextrema()[0] > 180
    names = [name for role, name in page.controls() if role in ("button", "radio", "slider")]
    assert len(names) == 103 and all(names)


@pytest.mark.matrix
@chromium
def test_hostile_text_is_shown_and_does_not_run(show):
    page = show(make_trace((EVIL, " b"), name=EVIL, model=EVIL, prompt=EVIL, notes=(EVIL,)))
    assert "alert" in page.find("document.querySelector('[data-word]').textContent")
    assert page.find("[...document.images].every(x => x.src.startsWith('data:'))")
    assert page.find("document.querySelector('#tokens').children.length") == 1
