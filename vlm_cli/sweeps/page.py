"""The results of a sweep as one web page: the table, and plots of the score against what a composition costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from vlm_cli.evaluation.figures import difference_cells, estimate_cells
from vlm_cli.report.scatter import COLOURS, ScatterPoint, draw_scatter
from vlm_cli.report.tables import human_count
from vlm_cli.report.web_page import page_head, page_text
from vlm_cli.sweeps.dimensions import describe_value
from vlm_cli.sweeps.overview import PROMPT, Costs
from vlm_cli.sweeps.results import Results, Row
from vlm_cli.sweeps.runs import RUNS
from vlm_cli.sweeps.tables import flops_text, range_text, results_table, short_name, shorten_values, split_names

__all__ = ["format_page"]

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
#: Title of a plot, the name of its axis, and what stands there.
_AXES: tuple[tuple[str, str, Callable[[Row, Costs], float | None]], ...] = (
    ("Operations of training", "FLOPs of training, each seed", lambda row, costs: row.training_flops),
    ("Operations", f"FLOPs of a prompt of one picture and {PROMPT.text} tokens", lambda row, costs: costs.flops),
    ("Vision tokens", "vision tokens per image", lambda row, costs: float(costs.tokens[1])),
    ("Parameters", "parameters", lambda row, costs: float(costs.parameters)),
)
_READING = (
    "The interval of a score says how far another choice of questions could move it; with several seeds, also another "
    "choice of seeds, as far as these few tell. A p-value is that of one comparison: of twenty compositions that are "
    "equally good, about one is below 0.05 by chance."
)


def format_page(results: Results) -> str:
    """Return the page."""
    base = results.facts.get("base", "")
    rows = "".join(f"<dt>{page_text(k)}</dt><dd>{page_text(x)}</dd>\n" for k, x in results.facts.items())
    rules = "".join(f"<dt>{page_text(x.name)}</dt><dd>{page_text(x.summary)}</dd>\n" for x in results.metrics)
    parts = [page_head(f"Sweep over {Path(base).name}", _STYLE), f"<dl>\n{rows}{rules}</dl>\n"]
    if plots := "".join(_plot(results, *axis) for axis in _AXES):
        parts.append(f'<h2>Scores and costs</h2>\n<div class="plots">\n{plots}</div>\n')
    parts += [f"<h2>Compositions</h2>\n{_table(results)}", f'<p class="note">{page_text(_READING)}</p>\n']
    notes = "".join(f"<li>{page_text(note)}</li>\n" for note in results_table(results).notes)
    parts += [f"<ul>\n{notes}</ul>\n" if notes else "", f"<h2>Runs</h2>\n{_runs(results)}</body>\n</html>\n"]
    return "".join(parts)


def _plot(results: Results, title: str, x_name: str, x_of: Callable[[Row, Costs], float | None]) -> str:
    """Draw the main figure of each composition against a cost."""
    points = []
    for row in results.rows:
        place = None if row.overview.costs is None else x_of(row, row.overview.costs)
        if row.score is None or place is None:
            continue
        main = row.score.main
        scale = 100 if main.figure.is_share else 1
        low, high = (scale * x for x in main.interval)
        text = f"{row.candidate.number}: {row.candidate.label}, {' '.join(estimate_cells(main)[1:])}"
        mark, colour = str(row.candidate.number), colour_of(row, results.rows)
        points.append(ScatterPoint(place, scale * main.value, (low, high), mark, text, colour))
    if not points:
        return ""
    figure = next(row.score.main.figure for row in results.rows if row.score is not None)
    y_name = f"{figure.name}{' in %' if figure.is_share else ''}"
    return draw_scatter(f"{y_name} and {title.lower()}", points, x_name=x_name, y_name=y_name)


def colour_of(row: Row, rows: Sequence[Row]) -> int:
    """Return the number of a composition's colour: that of its value in the first dimension that varies."""
    names, _ = split_names([x.candidate.values for x in rows])
    if not names:
        return 0
    values = list(dict.fromkeys(describe_value(x.candidate.values[names[0]]) for x in rows))
    return values.index(describe_value(row.candidate.values[names[0]]))


def _table(results: Results) -> str:
    """Return the table: costs, scores with their intervals below, and how they differ from those of the base."""
    names, _ = split_names([row.candidate.values for row in results.rows])
    numbers = ["parameters", "trainable", "tokens/image", "positions/image", "FLOPs"]
    scores = ["score", "each seed", "against base", "p"]
    body = "".join(_table_rows(row, results, names) for row in results.rows)
    head = "".join(f"<th>{page_text(x)}</th>" for x in ["", *map(short_name, names)])
    head += "".join(f'<th class="number">{page_text(x)}</th>' for x in numbers)
    head += "<th>metric</th>" + "".join(f'<th class="number">{page_text(x)}</th>' for x in scores)
    return f'<div class="wide">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'


def _table_rows(row: Row, results: Results, names: Sequence[str]) -> str:
    colour = colour_of(row, results.rows) % COLOURS
    named, _ = shorten_values(names, [x.candidate.values for x in results.rows])
    own = row.candidate.values
    values = "".join(f"<td>{page_text(named[name, describe_value(own[name])])}</td>" for name in names)
    begin = f'<td class="number"><span class="dot s{colour}">{row.candidate.number}</span></td>{values}'
    costs = row.overview.costs
    if costs is None:
        return f'<tr>{begin}<td colspan="10">impossible: {page_text(row.candidate.problem or "")}</td></tr>\n'
    numbers = [human_count(costs.parameters), human_count(costs.trainable)]
    numbers += [range_text(costs.tokens), range_text(costs.positions), flops_text(costs.flops)]
    begin += "".join(map(_number, numbers))
    if row.score is None:
        why = next((x.problem for x in row.seeds if x.problem), None)
        same = row.candidate.same_as
        words = f"the same as {same}" if same else f"failed: {why}" if why else "not done yet"
        return f'<tr>{begin}<td colspan="5">{page_text(words)}</td></tr>\n'
    found = []
    for i, estimate in enumerate(row.score.estimates):
        name, score, interval = estimate_cells(estimate)
        each = "<br>".join(page_text(estimate_cells(x.score.estimates[i])[1]) for x in row.seeds if x.score)
        cells = f'<td>{page_text(name)}</td>{_number(score, interval)}<td class="number">{each}</td>'
        style = ' class="base"' if row.is_base else ""
        found.append(f"<tr{style}>{begin}{cells}{_difference(row, i)}</tr>\n")
    return "".join(found)


def _difference(row: Row, figure: int) -> str:
    if row.is_base or not row.differences:
        return f'<td colspan="2" class="number">{"the base" if row.is_base else ""}</td>'
    x = row.differences[figure]
    low, high = x.interval
    value, interval, p_value = difference_cells(x)[3:]
    return _number(value, interval, style=" better" if low > 0 else " worse" if high < 0 else "") + _number(p_value)


def _number(text: str, below: str = "", *, style: str = "") -> str:
    """Return a cell of a number, perhaps with its interval below it."""
    small = f"<br><small>{page_text(below)}</small>" if below else ""
    return f'<td class="number{style}">{page_text(text)}{small}</td>'


def _runs(results: Results) -> str:
    """Return a table of the runs, with their files."""
    rows = []
    for row in results.rows:
        for x in row.seeds:
            folder = f"{RUNS}/{quote(x.run.folder.name)}"
            links = [("commands", "commands.sh"), ("log", "log.txt")]
            links += [("training", "trained/run.html"), ("answers", quote(x.run.answers.name))] if x.score else []
            linked = " ".join(f'<a href="{folder}/{file}">{name}</a>' for name, file in links)
            training = x.training
            numbers = [str(training.get("steps", "")), _seconds(training.get("seconds")), _loss(training.get("loss"))]
            score = "" if x.score is None else estimate_cells(x.score.main)[1]
            cells = "".join(_number(y) for y in (*numbers, score))
            name = f"{row.candidate.number}: {x.run.name}{f' (failed: {x.problem})' if x.problem else ''}"
            rows.append(f"<tr><td>{page_text(name)}</td>{cells}<td>{linked}</td></tr>\n")
    heads = "".join(f'<th class="number">{x}</th>' for x in ("steps", "seconds", "last loss", "score"))
    heads = f"<th>run</th>{heads}<th>files</th>"
    body = "".join(rows)
    return f'<div class="wide">\n<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
