"""A trace as a web page: one file that needs no other. Point at a word, and see where in the pictures it comes from.

The page is made here, with a drawing of the prompt; its script lays the maps over the pictures and draws the layers.
Whatever a prompt, a file's name or a model says is text: it is escaped in HTML, and the script sets text alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_cli.report.curves import draw_curves
from vlm_cli.report.web_page import data_uri, page_head, page_text
from vlm_cli.tracing.trace import HeatMap, Measure, Trace, TracedPicture

__all__ = ["make_page"]

_FILES = Path(__file__).parent
_STYLE = (_FILES / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FILES / "page.js").read_text(encoding="utf-8")

_MOST_PIXELS, _FEWEST_PIXELS = 640, 96  # of a picture's longer side in the file
_PICTURES_AT_MOST = 8  # of that size; more of them are smaller, so that all together take no more
_MOST_CELLS = 2_000_000  # of all maps together, each a byte; maps with more are made coarser
_COLOURS = 8  # of pictures, which then repeat; page.css has them
_ABOUT: dict[Measure, str] = {
    "attention": "share of the word's attention that reaches each part of a picture, through all layers",
    "occlusion": "how much less likely the word becomes if that part of a picture is blanked; blue where it becomes "
    "likelier",
}


def make_page(trace: Trace) -> bytes:
    """Return the page of a trace, in UTF-8: at most about 5 MB, whatever was traced."""
    parts = [
        page_head(f"What {trace.model} saw", _STYLE, _SCRIPT),
        f'<dl><dt>prompt</dt><dd class="text">{page_text(trace.prompt)}</dd></dl>\n',
        "<noscript><p>The maps need JavaScript.</p></noscript>\n",
        _controls(trace),
        f'<main>\n<div id="pictures" style="--tall:{_height(len(trace.pictures))}rem">\n',
        *(_picture(trace, i) for i in range(len(trace.pictures))),
        "</div>\n",
        _word_section(trace),
        "</main>\n",
        _layer_section(trace),
        _layout_section(trace),
        _notes(trace),
        f'<script type="application/json" id="data">{_as_script_data(_data(trace))}</script>\n',
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "".join(parts).encode()


def _as_script_data(data: Any) -> str:
    """Write plain data so that it can stand in a script element: nothing in it ends the element or begins a comment."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


# -- the answer and the pictures ---------------------------------------------------------------------------------------


def _controls(trace: Trace) -> str:
    """Return the answer, a button for each word, and the choice of the measure; it stays in sight."""
    words = "".join(_word_button(i, word.text, word.probability) for i, word in enumerate(trace.words))
    measures = "".join(
        f'<label title="{page_text(_ABOUT[measure])}"><input type="radio" name="measure" value="{measure}"'
        f"{' checked' if i == 0 else ''}> {measure}</label>"
        for i, measure in enumerate(trace.measures)
    )
    strength = '<label>heat <input type="range" id="strength" min="0" max="100" value="75"></label>'
    choice = f'<fieldset><legend class="unseen">Measure</legend>{measures}</fieldset>{strength}' if measures else ""
    return (
        f'<div id="bar">\n<p id="answer" class="text" aria-label="Answer">{words}</p>\n<div id="tools">{choice}'
        '<span id="legend"></span></div>\n</div>\n'
    )


def _word_button(number: int, text: str, probability: float) -> str:
    """Return a word as a button behind its space. A word of spaces alone gets a sign."""
    word = text.strip() or {"\n": "⏎", "\t": "⇥"}.get(text[:1], "␣")
    space = text[: len(text) - len(text.lstrip())]
    level = sum(probability >= least for least in (0.1, 0.5, 0.9))  # page.css has a line for each
    return (
        f'{page_text(space)}<button type="button" data-word="{number}" class="p{level}" aria-pressed="false">'
        f"{page_text(word)}</button>"
    )


def _height(pictures: int) -> int:
    """Return how tall a picture may be, in units of the text's size: with many pictures, all are in sight at once."""
    return 24 if pictures == 1 else 16 if pictures <= 4 else 11


def _picture(trace: Trace, number: int) -> str:
    """Return a picture with a canvas over it, at the picture's own aspect, and the outlines of its tiles."""
    picture = trace.pictures[number]
    ratio = picture.width / picture.height
    outlines = "".join(_outline(picture))
    tiles = (
        f'<svg viewBox="0 0 {picture.width} {picture.height}" aria-hidden="true">{outlines}</svg>' if outlines else ""
    )
    name = page_text(_name_picture(picture, number))
    return (
        f'<figure data-picture="{number}" style="--ratio:{ratio:.6g}">\n<figcaption>'
        f'<span class="c{number % _COLOURS} chip"></span><span title="{name}">{name}</span><output></output>'
        "</figcaption>\n"
        f'<div class="frame"><img src="{_embed(trace, picture)}" alt="{name}">'
        f"<canvas></canvas>{tiles}</div>\n</figure>\n"
    )


def _name_picture(picture: TracedPicture, number: int) -> str:
    place = "" if picture.frame is None else f"frame {picture.frame} of "
    if picture.seconds is not None:
        place = f"{picture.seconds:.2f} s of "
    return f"{number + 1}: {place}{picture.name}"


def _outline(picture: TracedPicture) -> Iterator[str]:
    """Yield the edges of the tiles into which a picture was cut."""
    for view in picture.views:
        if view.kind == "tile":
            left, top, right, bottom = view.box
            yield f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"/>'


def _embed(trace: Trace, picture: TracedPicture) -> str:
    """Return the address of a picture that holds it; of many pictures, they are smaller."""
    crowd = max(1.0, len(trace.pictures) / _PICTURES_AT_MOST)
    most = max(_FEWEST_PIXELS, round(_MOST_PIXELS / crowd**0.5))
    return data_uri(picture.image.convert("RGB"), most, quality=80)


def _word_section(trace: Trace) -> str:
    about = "".join(
        f'<p class="about" data-measure="{x}">{page_text(x)}: {page_text(_ABOUT[x])}</p>\n' for x in trace.measures
    )
    return (
        f'<aside aria-live="polite">\n<h2>The word <span id="word" class="text"></span></h2>\n<div id="tokens"></div>\n'
        f"{about}<p>A line below a word: the model gave it less than 90 % (grey), 50 % (dashed) or 10 % (dotted).</p>\n"
        "</aside>\n"
    )


# -- layers, prompt and notes ------------------------------------------------------------------------------------------


def _layer_section(trace: Trace) -> str:
    """Return the places of the charts of layers, and the gates; the script draws what depends on the word."""
    kinds = {layer.kind for layer in trace.layers}
    titles = {"layer": "Attention of the language model, by layer", "block": "Attention of the gated blocks, by layer"}
    charts = "".join(
        f'<figure class="chart">\n<figcaption>{title}</figcaption>\n'
        f'<div class="shares" data-kind="{kind}"></div>\n</figure>\n'
        for kind, title in titles.items()
        if kind in kinds
    )
    gates: dict[str, list[tuple[float, float]]] = {}
    for gate in trace.gates:
        gates.setdefault(gate.name, []).append((gate.layer, gate.opening))
    charts += draw_curves("Gates: |tanh|, by layer", gates)
    if not charts:
        return ""
    legend = "".join(
        f'<span><span class="c{i % _COLOURS} chip"></span>{page_text(_name_picture(x, i))}</span>'
        for i, x in enumerate(trace.pictures)
    )
    key = f'<p class="key"><span><span class="text-share chip"></span>text</span>{legend}</p>\n' if kinds else ""
    return f'<section>\n<h2>Layers</h2>\n{key}<div class="charts">\n{charts}</div>\n</section>\n'


def _layout_section(trace: Trace) -> str:
    """Return how the prompt lies in the language model: what each text and each picture costs, and what it sees."""
    layout, at = trace.layout, 0
    bar, rows, medium = [], [], 0
    for span in layout.spans:
        is_text = span.kind == "text"
        medium += not is_text
        colour = "text-share" if is_text else f"c{_first_picture(trace, medium) % _COLOURS}"
        bar.append(f'<rect class="{colour}" x="{span.start}" width="{span.positions}" height="1"/>')
        seen = ", ".join(map(str, span.sees)) or "none"
        cost = "" if span.vision_tokens is None else f"{span.vision_tokens:,}"
        cells = (f"{span.tokens:,}", f"{span.positions:,}", cost, f"{span.start}-{span.end - 1}", seen)
        what = page_text(span.content) if is_text else f'<span class="{colour} chip"></span>{page_text(span.content)}'
        rows.append(f'<tr><td class="text">{what}</td>{"".join(f"<td>{x}</td>" for x in cells)}</tr>\n')
        at = max(at, span.end)
    heads = ("span", "tokens", "positions", "vision tokens", "where", "sees media")
    left = "" if layout.left is None else f", {layout.left:,} of {layout.context:,} left"
    return (
        "<section>\n<h2>The prompt in the language model</h2>\n"
        f"<p>{len(layout.ids):,} tokens at {layout.positions:,} positions{left}.</p>\n"
        f'<svg class="bar" viewBox="0 0 {max(at, 1)} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="positions of texts and pictures">{"".join(bar)}</svg>\n'
        f'<div class="wide"><table>\n<thead><tr>{"".join(f"<th>{x}</th>" for x in heads)}</tr></thead>\n<tbody>\n'
        f"{''.join(rows)}</tbody>\n</table></div>\n</section>\n"
    )


def _first_picture(trace: Trace, medium: int) -> int:
    """Return the number of the first picture of a medium, from 0."""
    return next((i for i, x in enumerate(trace.pictures) if x.medium == medium), 0)


def _notes(trace: Trace) -> str:
    if not trace.notes:
        return ""
    items = "".join(f"<li>{page_text(note)}</li>\n" for note in trace.notes)
    return f"<section>\n<h2>Notes</h2>\n<ul>\n{items}</ul>\n</section>\n"


# -- what the script reads ---------------------------------------------------------------------------------------------


def _data(trace: Trace) -> dict[str, Any]:
    """Return words, maps and shares; numbers of maps and shares are bytes in base64."""
    return {
        "words": [
            {
                "text": word.text,
                "probability": word.probability,
                "tokens": [
                    {
                        "text": token.text,
                        "probability": float(np.exp(token.log_probability)),
                        "alternatives": [[x.text, x.probability] for x in token.alternatives],
                    }
                    for token in word.tokens
                ],
            }
            for word in trace.words
        ],
        "measures": {measure: _maps(trace, measure) for measure in trace.measures},
        "layers": [{"layer": x.layer, "kind": x.kind, "shares": _shares(x.text, x.pictures)} for x in trace.layers],
    }


def _maps(trace: Trace, measure: Measure) -> dict[str, Any]:
    """Return the maps of a measure: word after word, in each picture after picture, in each row after row.

    A byte holds a value as a share of its word's scale, from -1 (0) over nothing (127) to 1 (254).
    """
    most = _most_cells(trace)
    scales = [trace.scale(word, measure) for word in range(len(trace.words))]
    grids: list[tuple[int, int]] = []
    wholes, pieces = [], []
    for word, scale in enumerate(scales):
        of_word = [trace.map(word, picture, measure) for picture in range(len(trace.pictures))]
        tables = [np.zeros((1, 1)) if found is None else _coarser(_table(found), most) for found in of_word]
        grids = [(table.shape[0], table.shape[1]) for table in tables]
        wholes.append([None if found is None else found.whole for found in of_word])
        for table in tables:
            pieces.append((table / scale * 127 + 127).round().clip(0, 254).astype(np.uint8).tobytes())
    return {"grids": grids, "scales": scales, "wholes": wholes, "cells": _encode(b"".join(pieces))}


def _table(found: HeatMap) -> np.ndarray:
    return np.asarray(found.values, dtype=np.float64)


def _most_cells(trace: Trace) -> int:
    """Return how many cells a map of the page may have."""
    return max(1, _MOST_CELLS // max(1, len(trace.maps)))


def _coarser(table: np.ndarray, most: int) -> np.ndarray:
    """Average neighbouring cells until a map has few enough of them."""
    factor, (rows, columns) = 1, table.shape
    while rows * columns > most:
        factor += 1
        rows, columns = (-(-n // factor) for n in table.shape)
    padded = np.full((rows * factor, columns * factor), np.nan)
    padded[: table.shape[0], : table.shape[1]] = table
    return np.asarray(np.nanmean(padded.reshape(rows, factor, columns, factor), axis=(1, 3)))


def _shares(text: Sequence[float], pictures: Sequence[Sequence[float]]) -> str:
    """Return the shares of a layer: for each word that of text, and of each picture, as bytes from 0 to 255."""
    table = np.column_stack([np.asarray(text), np.asarray(pictures).reshape(len(text), -1)])
    return _encode((table * 255).round().clip(0, 255).astype(np.uint8).tobytes())


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
