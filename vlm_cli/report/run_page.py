"""A run of training as one web page: its curves, and what the model answers at each checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_cli.report.curves import Point, draw_curves, smooth
from vlm_cli.report.examination import Examination, Question
from vlm_cli.report.web_page import page_head, page_text

__all__ = ["format_run_page"]

MOST_STEPS = 8  # checkpoints whose answers the page shows: the first one, and the last ones
MOST_TEXT = 400  # characters of a text; the files beside the page hold the rest
RELOAD = 30  # seconds after which a browser reads the page of a run that goes on

_STYLE = (Path(__file__).parent / "run_page.css").read_text(encoding="utf-8")
_GIGA = 1e9
_RATE = "learning_rate"


def format_run_page(
    title: str,
    facts: Mapping[str, str],
    entries: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    examinations: Sequence[Examination],
    *,
    progress: float | None,
) -> str:
    """Return the page. Its size is bounded: curves are thinned, texts cut, and the caller bounds the pictures.

    Args:
        title: of the page.
        facts: names and values.
        entries: of `metrics.jsonl`.
        questions: that the page shows.
        examinations: answers to them, among others, in the order of their steps.
        progress: share of the run that is done, 0 to 1, or None at the end.
    """
    parts = [page_head(title, _STYLE, reload_seconds=None if progress is None else RELOAD)]
    if progress is not None:
        parts.append(f'<progress value="{progress:.4f}" aria-label="share of the run"></progress>\n')
    rows = "".join(f"<dt>{page_text(name)}</dt><dd>{page_text(value)}</dd>\n" for name, value in facts.items())
    parts.append(f'<dl>\n{rows}</dl>\n<h2>Curves</h2>\n<div class="curves">\n{_curves(entries)}</div>\n')
    if questions and examinations:
        cards = "".join(_card(question, number, examinations) for number, question in enumerate(questions))
        parts.append(f'<h2>Answers to held-out questions</h2>\n<div class="cards">\n{cards}</div>\n')
    return "".join([*parts, "</body>\n</html>\n"])


def _curves(entries: Sequence[Mapping[str, Any]]) -> str:
    def points(key: str, factor: float = 1.0) -> list[Point]:
        return [(x["step"], factor * x[key]) for x in entries if isinstance(x.get(key), (int, float))]

    rates = {key.partition("/")[2] or "rate": points(key) for key in _keys(entries, _RATE)}
    if len(rates) > 1:
        rates.pop("rate", None)  # the highest of the parts' own
    gates = {key.partition("/")[2]: points(key) for key in _keys(entries, "gates/")}
    figures = [
        draw_curves(
            "Loss per token", {"·": points("loss"), "mean": smooth(points("loss")), "held out": points("eval_loss")}
        ),
        draw_curves("Right answers", {"exact": points("exact", 100)}, unit="% of held-out questions"),
        draw_curves("Learning rate", rates),
        draw_curves("Opening of the gates", gates, unit="mean of |tanh|"),
        draw_curves("Gradient norm", {"norm": points("grad_norm")}),
        draw_curves("Images", {"images": points("images_per_second")}, unit="per second"),
        draw_curves("Tokens", {"tokens": points("tokens_per_second")}, unit="per second"),
        draw_curves("Use of the device", {"used": points("utilisation", 100)}, unit="% of its operations"),
        draw_curves("Peak memory", {"memory": points("memory", 1 / _GIGA)}, unit="GB"),
    ]
    return "".join(figures)


def _keys(entries: Sequence[Mapping[str, Any]], start: str) -> list[str]:
    """Return the keys of entries that begin so, each once."""
    return list(dict.fromkeys(key for entry in entries for key in entry if key.startswith(start)))


def _card(question: Question, number: int, examinations: Sequence[Examination]) -> str:
    """Return a question, and the answers to it: in each examination, the one with its number."""
    given = [(x.step, x.answers[number]) for x in examinations if number < len(x.answers)]
    if not given:
        return ""
    shown = given if len(given) <= MOST_STEPS else [given[0], *given[1 - MOST_STEPS :]]
    rows = "".join(
        f'<tr><td>step {step:,}</td><td class="text {"exact" if answer.exact else "wrong"}">'
        f"{_cut(answer.answer.strip()) or _NOTHING}</td></tr>\n"
        for step, answer in shown
    )
    pictures = "".join(f'<img src="{uri}" alt="">' for uri in question.pictures)
    return (
        f'<article class="card{" right" if given[-1][1].exact else ""}">\n<header>{page_text(question.id)}</header>\n'
        f'<p>{pictures}<span class="text">{_cut(question.prompt)}</span></p>\n<table>\n'
        f'<tr><td>expected</td><td class="text">{_cut(question.expected.strip())}</td></tr>\n'
        f"{rows}</table>\n</article>\n"
    )


_NOTHING = '<span class="nothing">(nothing)</span>'


def _cut(text: str) -> str:
    return page_text(text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…")
