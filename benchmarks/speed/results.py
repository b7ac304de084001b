"""What was found: rows, bars and tables of a question, as JSON and as a page."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.speed.measure import Outcome, Pairs

__all__ = ["Bar", "Report", "Row", "Table", "bars_table", "environment", "markdown_table", "page"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; `ratio` is our cost over the peer's, so that below 1 is ahead."""

    size: str
    case: str
    ours: str
    peer: str
    unit: str  # of the two medians: "s", "s/token" or "B"
    ours_median: float | None = None
    peer_median: float | None = None
    ratio: float | None = None  # median of the pairs
    low: float | None = None  # first quartile of the pairs
    high: float | None = None  # third quartile
    pairs: int = 0
    skipped: str | None = None

    def cells(self) -> list[str]:
        if self.ratio is None:
            return [self.size, self.case, self.ours, self.peer, "", "", f"skipped: {self.skipped}", "", ""]
        return [
            self.size,
            self.case,
            self.ours,
            self.peer,
            _quantity(self.ours_median, self.unit),
            _quantity(self.peer_median, self.unit),
            f"{self.ratio:.3f}",
            f"{self.low:.3f} – {self.high:.3f}",
            str(self.pairs),
        ]


ROW_HEAD = ("size", "case", "ours", "peer", "ours costs", "peer costs", "ours / peer", "quartiles", "pairs")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What is asked of a value.

    Attributes:
        name: what the value is.
        value: as measured; None where it was not.
        limit: None where the value is only told.
        sense: on which side of the limit it should be.
    """

    name: str
    value: float | None
    limit: float | None = None
    sense: Literal["at least", "at most"] = "at most"

    @property
    def verdict(self) -> Literal["met", "MISSED", "skipped", "told"]:
        """
        >>> Bar(name="speed", value=0.91, limit=0.9, sense="at least").verdict
        'met'
        >>> Bar(name="time", value=1.06, limit=1.05).verdict
        'MISSED'
        """
        if self.value is None:
            return "skipped"
        if self.limit is None:
            return "told"
        is_met = self.value >= self.limit if self.sense == "at least" else self.value <= self.limit
        return "met" if is_met else "MISSED"

    def cells(self) -> list[str]:
        limit = "" if self.limit is None else f"{self.sense} {self.limit:g}"
        return [self.name, "" if self.value is None else f"{self.value:.3f}", limit, self.verdict]


@dataclass(frozen=True)
class Table:
    """Other numbers of a question."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Report:
    """What a question found.

    Attributes:
        question: its name.
        asks: it, in words.
        command: that measures it again.
        settings: sizes, pairs, dtype, threads.
    """

    question: str
    asks: str
    command: str
    settings: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, size: str, case: object, ours: str, outcomes: Mapping[str, Outcome], unit: str = "s") -> None:
        """A row for each peer."""
        for peer, outcome in outcomes.items():
            names: dict[str, Any] = {"size": size, "case": str(case), "ours": ours, "peer": peer, "unit": unit}
            if not isinstance(outcome, Pairs):
                self.rows.append(Row(**names, skipped=str(outcome)))
                continue
            low, high = outcome.spread
            self.rows.append(
                Row(
                    **names,
                    ours_median=statistics.median(outcome.ours),
                    peer_median=statistics.median(outcome.peer),
                    ratio=outcome.ratio,
                    low=low,
                    high=high,
                    pairs=len(outcome.ours),
                )
            )

    def ratio(self, case: object, ours: str, peer: str, size: str | None = None) -> float | None:
        """That of a row that is there already; of the standard size if there are several."""
        found = [r for r in self.rows if (r.case, r.ours, r.peer) == (str(case), ours, peer)]
        sizes = [size] if size else ["standard", *(r.size for r in found)]
        return next((r.ratio for s in sizes for r in found if r.size == s), None)

    def to_dict(self) -> dict[str, Any]:
        bars = [{**asdict(bar), "verdict": bar.verdict} for bar in self.bars]
        return {**environment(), **asdict(self), "bars": bars}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        names = ("question", "asks", "command", "settings", "notes", "seconds")
        return cls(
            **{name: data[name] for name in names},
            rows=[Row(**row) for row in data["rows"]],
            bars=[Bar(**{key: x for key, x in bar.items() if key != "verdict"}) for bar in data["bars"]],
            tables=[Table(x["title"], tuple(x["head"]), [tuple(row) for row in x["rows"]]) for x in data["tables"]],
        )

    def write(self, out: Path, date: str) -> Path:
        """`DATE-QUESTION.json` in the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{date}-{self.question}.json"
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    def markdown(self) -> str:
        """Its section of the page."""
        parts = [f"## {self.question}", self.asks, f"`{self.command}`, {self.seconds / 60:.1f} minutes."]
        if self.rows:
            parts.append(markdown_table(ROW_HEAD, [row.cells() for row in self.rows]))
        for table in self.tables:
            parts += [f"### {table.title}", markdown_table(table.head, table.rows)]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)


def page(reports: Sequence[Report], command: str, failed: Sequence[str] = ()) -> str:
    """All questions on one page, the bars first."""
    facts = environment()
    found = ", ".join(f"{name} {x}" for name, x in facts["versions"].items())
    settings = reports[0].settings if reports else {}
    parts = [
        f"# Speed, {facts['date']}",
        f"`{command}`",
        f"{facts['gpu'] or facts['cpu']}, {settings.get('threads')} thread, {settings.get('dtype')} unless said; "
        f"{found}; commit {facts['commit']}. Peers have equal sizes and random weights, and run in turns with ours in "
        "one run. A ratio is our cost over the peer's, median of the pairs: below 1 is ahead.",
        "## Bars",
        bars_table([bar for report in reports for bar in report.bars]),
        *(f"**{name} failed**: `python -m benchmarks.speed.{name}` tells why." for name in failed),
        *(report.markdown() for report in reports),
    ]
    return "\n\n".join(parts) + "\n"


def bars_table(bars: Sequence[Bar]) -> str:
    return markdown_table(("what", "value", "bar", "verdict"), [bar.cells() for bar in bars])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(markdown_table(("a", "b"), [("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, *rows]
    return "\n".join(
        [
            f"| {' | '.join(lines[0])} |",
            "|" + "---|" * len(head),
            *(f"| {' | '.join(line)} |" for line in lines[1:]),
        ]
    )


def environment() -> dict[str, Any]:
    """Where and with what it ran."""
    from datetime import date

    names = ("torch", "transformers", "open_clip_torch", "timm", "vlm-cli")
    return {
        "date": date.today().isoformat(),
        "commit": _commit(ROOT),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "weights": "equal sizes, random weights",
    }


def _commit(folder: Path) -> str:
    """Of a checkout; with a plus if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return "unknown" if not commit else commit + ("+" if git("status", "--porcelain", "-uno") else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _quantity(value: float | None, unit: str) -> str:
    """
    >>> _quantity(0.0123, "s/token"), _quantity(2.5, "s"), _quantity(1.5e9, "B")
    ('12.3 ms/token', '2.50 s', '1.500 GB')
    """
    if value is None:
        return ""
    if unit == "B":
        return f"{value / 1e9:.3f} GB"
    return f"{value * 1e3:.1f} m{unit}" if value < 1 else f"{value:.2f} {unit}"
