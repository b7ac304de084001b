"""Write answers as a web page with the pictures in it: one file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, TextIO

from vlm_cli.errors import MediaError
from vlm_cli.evaluation.items import GradedAnswer
from vlm_cli.evaluation.scores import RULE, Score
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.prompt import Medium

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["write_page"]

MAX_PIXELS = 320  # of the longer side of a picture in the file
_SHOWN_PIXELS = 128  # height of a picture on the page

_STYLE = f"""
:root {{ color-scheme: light dark; --line: #8884; --wrong: #c62828; --right: #2e7d32 }}
@media (prefers-color-scheme: dark) {{ :root {{ --wrong: #ff8a80; --right: #81c784 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
td {{ white-space: nowrap }}
td:first-child {{ white-space: normal; overflow-wrap: anywhere }}
tfoot td {{ font-weight: bold; border-bottom: 0 }}
meter {{ width: 10rem }}
@media (max-width: 40rem) {{ meter {{ display: none }} }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem;
  align-items: start }}
.card {{ border: 1px solid var(--line); border-left: .3rem solid var(--wrong); border-radius: .4rem; padding: .8rem }}
.card.right {{ border-left-color: var(--right) }}
.card header {{ display: flex; justify-content: space-between; gap: 1rem; font-size: .8rem; opacity: .75 }}
.card p, .card dl {{ margin: .5rem 0 0 }}
.card, .text {{ overflow-wrap: anywhere }}
.prompt {{ display: flex; flex-wrap: wrap; gap: .5rem; align-items: center }}
.prompt .text {{ flex: 1 1 9rem }}
.text {{ white-space: pre-wrap; unicode-bidi: isolate }}
.nothing {{ opacity: .6; font-style: italic }}
img {{ height: {_SHOWN_PIXELS}px; max-width: 100%; object-fit: contain; border-radius: .2rem }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 .8rem }}
dt {{ opacity: .75 }}
dd {{ margin: 0 }}
.given {{ color: var(--wrong); font-weight: 600 }}
.right .given {{ color: var(--right) }}
summary {{ cursor: pointer; font-size: 1.3rem; font-weight: bold; margin: 2rem 0 1rem }}
"""

#: Control characters, which HTML cannot hold, and the symbols that stand for them: ␀ for NUL.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def write_page(
    file: TextIO,
    title: str,
    facts: Mapping[str, str],
    kinds: Mapping[str | None, Score],
    total: Score,
    answers: Sequence[GradedAnswer],
    loader: MediaLoader,
) -> None:
    """Write a page: the scores, the wrong answers, and the right answers in a section that is folded.

    The page holds pictures of at most `MAX_PIXELS`; one picture at a time is in memory.

    Args:
        file: to write to.
        title: of the page.
        facts: how the answers were made: names and values.
        kinds: the score of each kind.
        total: the score of all items.
        answers: in the order of the records.
        loader: finds images.
    """
    file.write(_head(title))
    file.write(_facts(facts) + _table(kinds, total))
    wrong = [a for a in answers if not a.exact]
    right = [a for a in answers if a.exact]
    _write_section(file, f"Wrong answers ({len(wrong):,})", wrong, loader, is_open=True)
    _write_section(file, f"Right answers ({len(right):,})", right, loader, is_open=not wrong)
    file.write("</body>\n</html>\n")


def _head(title: str) -> str:
    # The policy forbids the page to fetch anything, whatever a record says.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
"""


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in facts.items())
    return f"<dl>\n{rows}</dl>\n<p>{_text(RULE)}</p>\n"


def _table(kinds: Mapping[str | None, Score], total: Score) -> str:
    body = "".join(_table_row("(no kind)" if kind is None else kind, score) for kind, score in kinds.items())
    return (
        "<table>\n<thead><tr><th>kind</th><th>items</th><th>exact</th><th>share</th><th>95 % interval</th><th></th>"
        f"</tr></thead>\n<tbody>\n{body}</tbody>\n<tfoot>\n{_table_row('total', total)}</tfoot>\n</table>\n"
    )


def _table_row(name: str, score: Score) -> str:
    low, high = score.interval
    return (
        f"<tr><td>{_text(name)}</td><td>{score.items:,}</td><td>{score.exact:,}</td><td>{100 * score.share:.1f} %</td>"
        f'<td>{100 * low:.1f} – {100 * high:.1f} %</td><td><meter value="{score.share:.4f}"></meter></td></tr>\n'
    )


def _write_section(
    file: TextIO, title: str, answers: Sequence[GradedAnswer], loader: MediaLoader, *, is_open: bool
) -> None:
    if not answers:
        return
    file.write(f'<details{" open" if is_open else ""}>\n<summary>{title}</summary>\n<div class="cards">\n')
    for answer in answers:
        file.write(_card(answer, loader))
    file.write("</div>\n</details>\n")


def _card(answer: GradedAnswer, loader: MediaLoader) -> str:
    item, mark = answer.item, "✓ right" if answer.exact else "✗ wrong"
    prompt = "".join(
        _picture(part.source, loader) if isinstance(part, Medium) else f'<span class="text">{_text(part.text)}</span>'
        for part in item.prompt
    )
    return (
        f'<article class="card{" right" if answer.exact else ""}">\n'
        f"<header><span>{mark}</span><span>{_text(item.kind or '')}</span><span>{_text(item.id)}</span></header>\n"
        f'<p class="prompt">{prompt}</p>\n'
        f'<dl><dt>expected</dt><dd class="text">{_text(item.expected.strip())}</dd>\n'
        f'<dt>answer</dt><dd class="text given">{_text(answer.text.strip()) or _NOTHING}</dd></dl>\n</article>\n'
    )


_NOTHING = '<span class="nothing">(nothing)</span>'


def _text(text: str) -> str:
    """Turn text into HTML that shows it.

    >>> _text("<b>\\0")
    '&lt;b&gt;␀'
    """
    return escape(text.translate(_CONTROLS))


def _picture(source: str, loader: MediaLoader) -> str:
    name = _text(short_name(source))
    try:
        image = loader.load(source).image
    except MediaError:  # the file was removed after the question was asked
        return f'<span class="nothing">(cannot be read: {name})</span>'
    return f'<img src="{_data_uri(image)}" alt="{name}" title="{name}" loading="lazy">'


def _data_uri(image: Image) -> str:
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
