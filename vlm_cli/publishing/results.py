"""Results of `vlm eval --json` for a model card: its metadata, a table, and the command that measures them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult

from vlm_cli.errors import UsageError
from vlm_cli.plain_data import read_json
from vlm_cli.printable import escape_controls, markdown_code
from vlm_cli.schema import check, list_of, mapping, mapping_of, number, optional, text, whole

__all__ = ["Evaluation", "read_evaluations"]

_SCORE = mapping({"value": number(-1e9, 1e9)}, {"interval": optional(list_of(number(-1e9, 1e9), least=2, most=2))})
_RESULT = mapping(
    {
        "data": text(),
        "metrics": mapping_of(mapping({})),
        "model": text(),
        "total": mapping({"items": whole(0, 10**12), "scores": mapping_of(_SCORE, least=1)}),
    },
    {"limit": optional(whole(1, 10**12)), "max_new_tokens": optional(whole(1, 10**6)), "control": optional(text())},
)
#: Keys of a result that change the answers, and the flag of each.
_FLAGS = {"max_new_tokens": "--max-new-tokens", "limit": "--limit", "control": "--control"}


@dataclass(frozen=True)
class Evaluation:
    """One model's scores on one file of records.

    Attributes:
        data: name of the file or data set; no folder of the machine on which it was.
        sha256: hash of the records.
        items: how many were answered.
        scores: metric -> its value, and the ends of its 95 % interval.
        command: that measures them, for a model in the folder MODEL.
    """

    data: str
    sha256: str | None
    items: int
    scores: Mapping[str, tuple[float, list[float] | None]]
    command: str

    def to_metadata(self) -> Iterator[EvalResult]:
        """Yield each score as the hub's metadata has it; hf:ORG/NAME[:CONFIG][:SPLIT] is a data set of the hub."""
        kind, _, rest = self.data[3:].partition(":") if self.data.startswith("hf:") else ("custom", "", self.data)
        for name, (value, _) in self.scores.items():
            yield EvalResult(
                task_type="image-text-to-text",
                dataset_type=kind,
                dataset_name=self.data,
                dataset_config=rest or None,
                dataset_revision=self.sha256,
                metric_type=name,
                metric_value=round(value, 4),
            )

    def to_rows(self) -> Iterator[str]:
        """Yield the rows of a table in Markdown."""
        for name, (value, interval) in self.scores.items():
            ends = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
            yield f"| {markdown_code(self.data)} | {markdown_code(name)} | {value:.3f} | {ends} | {self.items:,} |"


def read_evaluations(paths: list[Path]) -> list[Evaluation]:
    """Read files that `vlm eval MODEL --data … --json` printed.

    Raises:
        UsageError: if a file holds something else.
    """
    return [_read(path) for path in paths]


def _read(path: Path) -> Evaluation:
    try:
        data = read_json(path)
    except OSError as error:
        raise UsageError(f"cannot read the results {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"the results {str(path)!r} cannot be read: {error}. {_ADVICE}") from None
    if isinstance(data, Mapping) and "models" in data:
        raise UsageError(f"the results {str(path)!r} compare several models. Evaluate this model alone. {_ADVICE}")
    try:
        check(data, _RESULT, repr(str(path)), UsageError)
    except UsageError as error:
        raise UsageError(f"{error} {_ADVICE}") from None
    name = data["data"] if data["data"].startswith("hf:") else PurePath(data["data"]).name
    scores = {key: (x["value"], x.get("interval")) for key, x in data["total"]["scores"].items()}
    sha256 = data.get("data_sha256")
    return Evaluation(
        name, sha256 if isinstance(sha256, str) else None, data["total"]["items"], scores, _command(name, data)
    )


_ADVICE = "Write such a file with: vlm eval MODEL --data FILE --json > results.json"


def _command(name: str, data: Mapping[str, Any]) -> str:
    words = ["vlm", "eval", "MODEL", "--data", name, "--metric", ",".join(data["metrics"])]
    for key, flag in _FLAGS.items():
        if data.get(key) is not None:
            words += [flag, str(data[key])]
    return escape_controls(shlex.join(words))
