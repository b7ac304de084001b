"""Write answers as a web page with the pictures in it: one file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from vlm_cli.errors import MediaError, PromptError
from vlm_cli.evaluation.answers import GradedAnswer, make_sample
from vlm_cli.evaluation.comparison import Difference
from vlm_cli.evaluation.figures import difference_cells, estimate_cells, name_kind
from vlm_cli.evaluation.items import Item
from vlm_cli.evaluation.metrics import Metric
from vlm_cli.evaluation.scores import Score
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.prompt import Medium
from vlm_cli.report.web_page import data_uri, page_head
from vlm_cli.report.web_page import page_text as _text

__all__ = ["Column", "write_page"]

MOST_FRAMES = 8  # of a clip that the page shows
MAX_PIXELS = 320  # of the longer side of a picture in the file

_FILES = Path(__file__).parent
_STYLE = (_FILES / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FILES / "page.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Column:
    """What the page shows of one model.

    Attributes:
        name: of the model; empty if the page shows one model only.
        kinds: the score of each kind.
        total: the score of all items.
        answers: in the order of the records.
        differences: to the first model; none for the first.
    """

    name: str
    kinds: Mapping[str | None, Score]
    total: Score
    answers: Sequence[GradedAnswer]
    differences: Sequence[Difference] = ()


@dataclass(frozen=True)
class _Case:
    """An item and its answers, by the names of the models."""

    item: Item
    answers: Mapping[str, GradedAnswer | None]

    @property
    def is_right(self) -> bool:
        """Whether every model has the full mark."""
        return all(x is not None and x.is_right for x in self.answers.values())

    @property
    def are_apart(self) -> bool:
        """Whether the models have other marks."""
        return len({None if x is None else tuple(x.marks.values()) for x in self.answers.values()}) > 1


def write_page(
    file: TextIO,
    title: str,
    facts: Mapping[str, str],
    metrics: Sequence[Metric],
    columns: Sequence[Column],
    loader: MediaLoader,
) -> None:
    """Write a page: the scores, the wrong answers, and the right answers in a section that is folded.

    Answers are right if they have the full mark of the first metric. Of several models, the items come first at which
    they differ. The page holds pictures of at most `MAX_PIXELS`; one picture at a time is in memory.

    Args:
        file: to write to.
        title: of the page.
        facts: how the answers were made: names and values.
        metrics: by which the answers are marked.
        columns: the models.
        loader: finds images.
    """
    kinds = list(dict.fromkeys(kind for column in columns for kind in column.kinds))
    file.write(page_head(title, _STYLE, _SCRIPT))
    file.write(_facts(facts, metrics))
    for column in columns:
        file.write(_table(column))
    for column in columns:
        if column.differences:
            file.write(_differences(columns[0].name, column))
    file.write(_filter(kinds))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    cases = _cases(columns)
    wrong = sorted((x for x in cases if not x.is_right), key=lambda x: not x.are_apart)
    right = [x for x in cases if x.is_right]
    below, full = ("Wrong", "Right") if metrics[0].is_binary else ("Not wholly right", "Wholly right")
    _write_section(file, f"{below} answers ({len(wrong):,})", wrong, numbers, loader, is_open=True)
    _write_section(file, f"{full} answers ({len(right):,})", right, numbers, loader, is_open=not wrong)
    file.write(f"<script>{_SCRIPT}</script>\n</body>\n</html>\n")


def _cases(columns: Sequence[Column]) -> list[_Case]:
    """Return the items that a model answered, in the order of the records."""
    given = {column.name: {x.item.key: x for x in column.answers} for column in columns}
    items = {key: answer.item for answers in given.values() for key, answer in answers.items()}
    return [_Case(item, {name: answers.get(key) for name, answers in given.items()}) for key, item in items.items()]


def _facts(facts: Mapping[str, str], metrics: Sequence[Metric]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in facts.items())
    rules = "".join(
        f"<p><strong>{_text(x.name)}</strong>: {_text(x.summary)} ({_text(x.source)})</p>\n" for x in metrics
    )
    return f"<dl>\n{rows}</dl>\n{rules}"


def _table(column: Column) -> str:
    body = "".join(_table_rows(name_kind(kind), score) for kind, score in column.kinds.items())
    caption = f"<caption>{_text(column.name)}</caption>" if column.name else ""
    head = _row("th", ("kind", "items", "metric", "score", "95 % interval", ""))
    return (
        f'<div class="wide">\n<table>\n{caption}<thead>{head}</thead>\n<tbody>\n{body}</tbody>\n'
        f"<tfoot>\n{_table_rows('total', column.total)}</tfoot>\n</table>\n</div>\n"
    )


def _table_rows(name: str, score: Score) -> str:
    """Return a row for each figure."""
    rows = []
    for estimate in score.estimates:
        cells = "".join(f"<td>{_text(x)}</td>" for x in (name, f"{score.items:,}", *estimate_cells(estimate)))
        bar = f'<meter value="{estimate.value:.4f}"></meter>' if estimate.figure.is_share else ""
        rows.append(f"<tr>{cells}<td>{bar}</td></tr>\n")
    return "".join(rows)


def _differences(first: str, column: Column) -> str:
    """Return the table of a model against the first one."""
    head = _row("th", ("metric", "items", first, column.name, "difference", "95 % interval", "p", "test"))
    body = ""
    for x in column.differences:
        name, *cells = difference_cells(x)
        body += _row("td", (name, f"{x.items:,}", *cells, x.test)) + "\n"
    return f'<div class="wide">\n<table>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_text(x)}</{tag}>' for x in cells)}</tr>"


def _filter(kinds: Sequence[str | None]) -> str:
    """Return the fields that choose among the cards; the script shows them, because they need it."""
    options = "".join(f'<option value="{i}">{_text(name_kind(kind))}</option>' for i, kind in enumerate(kinds))
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
    cases: Sequence[_Case],
    numbers: Mapping[str | None, int],
    loader: MediaLoader,
    *,
    is_open: bool,
) -> None:
    if not cases:
        return
    file.write(f'<details{" open" if is_open else ""}>\n<summary>{title}</summary>\n<div class="cards">\n')
    for case in cases:
        file.write(_card(case, numbers[case.item.kind], loader))
    file.write("</div>\n</details>\n")


def _card(case: _Case, kind: int, loader: MediaLoader) -> str:
    item, mark = case.item, "✓ right" if case.is_right else "✗ wrong"
    prompt = "".join(
        _pictures(part, loader) if isinstance(part, Medium) else f'<span class="text">{_text(part.text)}</span>'
        for part in item.asked
    )
    expected = " · ".join(dict.fromkeys(x.strip() for x in make_sample(item).accepted))
    answers = "".join(_answer(name, answer) for name, answer in case.answers.items())
    return (
        f'<article class="card{" right" if case.is_right else ""}" data-kind="{kind}">\n'
        f"<header><span>{mark}</span><span>{_text(item.kind or '')}</span><span>{_text(item.id)}</span></header>\n"
        f'<p class="prompt">{prompt}</p>\n'
        f'<dl><dt>expected</dt><dd class="text">{_text(expected)}</dd>\n{answers}</dl>\n</article>\n'
    )


def _answer(name: str, answer: GradedAnswer | None) -> str:
    """Return an answer, and its marks unless it is simply right or wrong."""
    said = "" if answer is None else _text(answer.text.strip())
    marks = {} if answer is None else answer.marks
    told = ", ".join(f"{key} {100 * value:.0f}" for key, value in marks.items())
    several = len(marks) > 1 or any(0 < x < 1 for x in marks.values())
    style = " is-right" if answer is not None and answer.is_right else ""
    return (
        f'<dt>{_text(name or "answer")}</dt><dd class="text given{style}">{said or _NOTHING}'
        f"{f' <small>{_text(told)}</small>' if several else ''}</dd>"
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
