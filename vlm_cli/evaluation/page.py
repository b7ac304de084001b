"""Write answers as a web page with the pictures in it: one file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from vlm_cli.errors import MediaError, PromptError
from vlm_cli.evaluation.items import GradedAnswer
from vlm_cli.evaluation.scores import RULE, Score
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.prompt import Medium
from vlm_cli.report.web_page import data_uri, page_head
from vlm_cli.report.web_page import page_text as _text

__all__ = ["write_page"]

MOST_FRAMES = 8  # of a clip that the page shows
MAX_PIXELS = 320  # of the longer side of a picture in the file

_FILES = Path(__file__).parent
_STYLE = (_FILES / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FILES / "page.js").read_text(encoding="utf-8")


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
    file.write(page_head(title, _STYLE, _SCRIPT))
    file.write(_facts(facts) + _table(kinds, total) + _filter(list(kinds)))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    wrong = [a for a in answers if not a.exact]
    right = [a for a in answers if a.exact]
    _write_section(file, f"Wrong answers ({len(wrong):,})", wrong, numbers, loader, is_open=True)
    _write_section(file, f"Right answers ({len(right):,})", right, numbers, loader, is_open=not wrong)
    file.write(f"<script>{_SCRIPT}</script>\n</body>\n</html>\n")


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in facts.items())
    return f"<dl>\n{rows}</dl>\n<p>{_text(RULE)}</p>\n"


def _table(kinds: Mapping[str | None, Score], total: Score) -> str:
    body = "".join(_table_row("(no kind)" if kind is None else kind, score) for kind, score in kinds.items())
    heads = "".join(f"<th>{name}</th>" for name in ("kind", "items", "exact", "share", "95 % interval", ""))
    return (
        f'<div class="wide">\n<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n'
        f"<tfoot>\n{_table_row('total', total)}</tfoot>\n</table>\n</div>\n"
    )


def _table_row(name: str, score: Score) -> str:
    low, high = score.interval
    return (
        f"<tr><td>{_text(name)}</td><td>{score.items:,}</td><td>{score.exact:,}</td><td>{100 * score.share:.1f} %</td>"
        f'<td>{100 * low:.1f} – {100 * high:.1f} %</td><td><meter value="{score.share:.4f}"></meter></td></tr>\n'
    )


def _filter(kinds: Sequence[str | None]) -> str:
    """Return the fields that choose among the cards; the script shows them, because they need it."""
    options = "".join(
        f'<option value="{number}">{_text("(no kind)" if kind is None else kind)}</option>'
        for number, kind in enumerate(kinds)
    )
    return (
        '<div class="filter" role="search">\n'
        '<input type="search" placeholder="Search questions and answers" aria-label="Search">\n'
        f'<select aria-label="Kind"><option value="">all kinds</option>{options}</select>\n'
        '<select aria-label="Right or wrong"><option value="">right and wrong</option><option value="wrong">wrong'
        '</option><option value="right">right</option></select>\n<output></output>\n</div>\n'
        "<noscript><p>Pictures, search and filters need JavaScript.</p></noscript>\n"
    )


def _write_section(
    file: TextIO,
    title: str,
    answers: Sequence[GradedAnswer],
    numbers: Mapping[str | None, int],
    loader: MediaLoader,
    *,
    is_open: bool,
) -> None:
    if not answers:
        return
    file.write(f'<details{" open" if is_open else ""}>\n<summary>{title}</summary>\n<div class="cards">\n')
    for answer in answers:
        file.write(_card(answer, numbers[answer.item.kind], loader))
    file.write("</div>\n</details>\n")


def _card(answer: GradedAnswer, kind: int, loader: MediaLoader) -> str:
    item, mark = answer.item, "✓ right" if answer.exact else "✗ wrong"
    prompt = "".join(
        _pictures(part, loader) if isinstance(part, Medium) else f'<span class="text">{_text(part.text)}</span>'
        for part in item.asked
    )
    return (
        f'<article class="card{" right" if answer.exact else ""}" data-kind="{kind}">\n'
        f"<header><span>{mark}</span><span>{_text(item.kind or '')}</span><span>{_text(item.id)}</span></header>\n"
        f'<p class="prompt">{prompt}</p>\n'
        f'<dl><dt>expected</dt><dd class="text">{_text(item.expected.strip())}</dd>\n'
        f'<dt>answer</dt><dd class="text given">{_text(answer.text.strip()) or _NOTHING}</dd></dl>\n</article>\n'
    )


_NOTHING = '<span class="nothing">(nothing)</span>'


def _pictures(medium: Medium, loader: MediaLoader) -> str:
    """Return an image, or frames of a clip, as HTML."""
    name = _text(short_name(medium.source))
    try:
        frames = loader.load_medium(medium.source, medium.kind).frames
    except (MediaError, PromptError):  # the file was removed after the question was asked
        return f'<span class="nothing">(cannot be read: {name})</span>'
    step = -(-len(frames) // MOST_FRAMES)
    # A browser leaves a template alone, so that pictures cost nothing until the script shows them.
    return "".join(
        f'<span class="picture"><template><img src="{data_uri(frame, MAX_PIXELS)}" alt="{name}" title="{name}">'
        "</template></span>"
        for frame in frames[::step]
    )
