"""How a model came about, from the record that `vlm train` wrote beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from vlm_cli.checkpoint.run_record import RUN_FILE
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.plain_data import read_json
from vlm_cli.printable import markdown_code, markdown_text

__all__ = ["Lineage", "read_lineage"]


@dataclass(frozen=True)
class Lineage:
    """The runs that made a model, the first one first.

    Attributes:
        bases: repositories of the hub with whose models the first run began; none for a directory.
        datasets: of the hub, from which the runs learned.
        rows: of a table in Markdown, one for each run.
    """

    bases: Sequence[str] = ()
    datasets: Sequence[str] = ()
    rows: Sequence[str] = ()


def read_lineage(folder: Path) -> Lineage:
    """Read the record of a model's directory; it is empty if `vlm train` did not write the directory."""
    try:
        last = read_json(folder / RUN_FILE)
    except (OSError, ValueError):
        return Lineage()
    if not isinstance(last, Mapping):
        return Lineage()
    earlier = last.get("stages")
    runs = [x for x in (*(earlier if isinstance(earlier, list) else ()), last) if isinstance(x, Mapping)]
    datasets = dict.fromkeys(x for run in runs for x in _datasets(_part(run, "job").get("data")))
    job = _part(runs[0], "job")
    model = job.get("base") or job.get("model")
    bases = [x for x in (model,) if isinstance(x, str) and "/" in x and is_hub_id(x) and not Path(x).exists()]
    return Lineage(bases, list(datasets), [_row(i, x) for i, x in enumerate(runs, 1)])


def _part(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = run.get(name)
    return found if isinstance(found, Mapping) else {}


def _sources(data: Any) -> Iterator[str]:
    """Yield the sources that a record names, whether it names one or a mixture."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for source in data.get("sources") or ():
            yield from _sources(source.get("data") if isinstance(source, Mapping) else source)


def _datasets(data: Any) -> Iterator[str]:
    for source in _sources(data):
        name = source.removeprefix("hf:").partition(":")[0]
        if source.startswith("hf:") and is_hub_id(name):
            yield name


def _row(number: int, run: Mapping[str, Any]) -> str:
    job, result, settings = (_part(run, name) for name in ("job", "result", "settings"))
    shown = [x if x.startswith("hf:") else PurePath(x).name for x in _sources(job.get("data"))]
    data = ", ".join(markdown_code(x) for x in shown[:10])
    name = run.get("stage") if isinstance(run.get("stage"), str) else str(number)
    cells = (
        markdown_text(str(name)),
        data,
        _number(result.get("records"), ",.0f"),
        _number(result.get("steps"), ",.0f"),
        _number(settings.get("learning_rate"), "g"),
        _number(result.get("loss"), ".4f"),
        _number(result.get("eval_loss"), ".4f"),
    )
    return f"| {' | '.join(cells)} |"


def _number(value: Any, spelling: str) -> str:
    return format(value, spelling) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
