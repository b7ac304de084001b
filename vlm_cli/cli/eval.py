"""`vlm eval`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.loading import keep_collecting
from vlm_cli.cli.options import DeviceOptions, JsonOption, SourceOptions, flatten_options
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.errors import UsageError
from vlm_cli.models import DEMO, resolve_built_model

__all__ = ["EvalOptions", "OutputOptions", "evaluate"]


@dataclass(frozen=True)
class EvalOptions:
    """What is asked, and how many at a time."""

    data: Annotated[Path | None, typer.Option("--data", "-d", help="Questions and answers, JSONL.")] = None
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Items answered at a time.")] = 32
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens of an answer.")] = 32
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many.")] = None


@dataclass(frozen=True)
class OutputOptions:
    """Files to write."""

    html: Annotated[Path | None, typer.Option(help="Write a page of pictures and answers, wrong ones first.")] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write each answer as a line of JSON.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False

    def check(self, data: Path) -> None:
        """
        Raises:
            VLMError: if a file may not be written.
        """
        from vlm_cli.files import check_file

        taken = {data.resolve(): "--data"}
        for flag, path in (("--html", self.html), ("--output", self.output)):
            if path is None:
                continue
            if other := taken.get(path.resolve()):
                raise UsageError(f"{flag} and {other} are the same file, {str(path)!r}. Choose another name.")
            taken[path.resolve()] = flag
            check_file(path, overwrite=self.overwrite)


@flatten_options
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory that `vlm build` wrote, or hub id.")
    ] = DEMO.name,
    questions: EvalOptions = EvalOptions(),
    files: OutputOptions = OutputOptions(),
    devices: DeviceOptions = DeviceOptions(),
    source: SourceOptions = SourceOptions(),
    as_json: JsonOption = False,
) -> None:
    """Ask a model questions with known answers, and count the right ones, by kind.

    A record is a line such as {"kind": "count", "prompt": "<image:cat.jpg>Q: How many cats? A:", "completion": " One."}

    Answers are greedy and end at a stop token. An answer is right if it equals the completion exactly, whitespace at
    both ends aside. The interval is Wilson's.

    Example: vlm eval my-flamingo --data questions.jsonl --html answers.html
    """
    from vlm_cli.evaluation.items import read_items

    if questions.data is None:
        raise UsageError(f"no questions are given: vlm eval {model} --data FILE.jsonl")
    files.check(questions.data)
    built = resolve_built_model(model, source.revision)
    items, records = read_items(questions.data, questions.limit)
    console.notify(f"{len(items):,} items from {questions.data}")
    evaluation = Evaluation(model, questions, items, records)
    evaluation.load(built, devices, source)
    evaluation.run()
    try:
        evaluation.write(files)
    finally:  # a full disk does not take the scores with it
        evaluation.print(as_json)


class Evaluation:
    """Items, what a model answers to them, and what is said of it.

    Args:
        name: of the model.
        questions: the user's options.
        items: to be answered.
        records: that they are from.
    """

    def __init__(self, name: str, questions: EvalOptions, items: Sequence[Any], records: Any) -> None:
        from vlm_cli.media import MediaLoader

        self.name, self.questions, self.items, self.records = name, questions, items, records
        self.loader = MediaLoader(records.folder)

    def load(self, built: str, devices: DeviceOptions, source: SourceOptions) -> None:
        """Load the model, and see that the items fit it."""
        from vlm_cli.quiet import silence_libraries

        silence_libraries()
        from vlm_cli.checkpoint.directory import load
        from vlm_cli.evaluation.items import check_lengths

        self.device, dtype = devices.resolve()
        self.model, self.processor = load(
            built, dtype=dtype, device=self.device, trust_remote_code=source.trust_remote_code, **source.hub
        )
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        console.notify(f"Model {self.name} on {self.device}, {self.dtype}")
        self.lengths = check_lengths(
            self.items, self.records, self.model, self.processor, self.questions.max_new_tokens
        )

    def run(self) -> None:
        """Answer and count."""
        from vlm_cli.evaluation.answers import answer, group
        from vlm_cli.evaluation.scores import score

        keep_collecting()
        started = time.monotonic()
        with ProgressLine(len(self.items)) as progress:
            self.answers = answer(
                self.model,
                self.processor,
                self.items,
                group(self.items, self.lengths, self.questions.batch_size),
                self.loader,
                SamplingOptions(max_new_tokens=self.questions.max_new_tokens).keywords(),
                name=str(self.questions.data),
                report=progress.show,
            )
        self.seconds = time.monotonic() - started
        self.kinds, self.total = score((a.item.kind, a.exact) for a in self.answers)
        self.unended = sum(not a.ended for a in self.answers)
        if self.unended:
            console.notify(
                f"Note: {self.unended:,} of {len(self.items):,} answers were cut at {self.questions.max_new_tokens} "
                "tokens, before a stop token; --max-new-tokens allows more."
            )

    def print(self, as_json: bool) -> None:
        if as_json:
            console.print_json(self.to_dict())
            return
        rows = [[_name(kind), *_cells(score)] for kind, score in self.kinds.items()]
        if list(self.kinds) == [None]:
            rows = []  # they are the total
        console.print_table(
            ["kind", "items", "exact", "share", "95 % interval"], [*rows, ["total", *_cells(self.total)]], total=True
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, with counts, shares from 0 to 1 and seconds."""
        from vlm_cli.evaluation.scores import RULE

        return {
            "model": self.name,
            "data": str(self.questions.data),
            "data_sha256": self.records.sha256,
            "device": self.device,
            "dtype": self.dtype,
            "batch_size": self.questions.batch_size,
            "max_new_tokens": self.questions.max_new_tokens,
            "limit": self.questions.limit,
            "rule": RULE,
            "seconds": round(self.seconds, 3),
            "items_per_second": round(len(self.items) / self.seconds, 1),
            "cut": self.unended,
            "total": _numbers(self.total),
            "kinds": [{"kind": kind, **_numbers(score)} for kind, score in self.kinds.items()],
            "answers": [a.to_dict() for a in self.answers],
        }

    def write(self, files: OutputOptions) -> None:
        """Write the files that were asked for."""
        import json

        from vlm_cli.evaluation.page import write_page
        from vlm_cli.files import replacing_file

        if files.output is not None:
            with replacing_file(files.output, overwrite=files.overwrite) as file:
                file.writelines(json.dumps(a.to_dict(), ensure_ascii=False) + "\n" for a in self.answers)
            console.notify(f"Wrote {files.output}")
        if files.html is not None:
            title = f"{Path(self.name).name} on {self.questions.data}"
            with replacing_file(files.html, overwrite=files.overwrite) as file:
                write_page(file, title, self._facts(), self.kinds, self.total, self.answers, self.loader)
            console.notify(f"Wrote {files.html}")

    def _facts(self) -> Mapping[str, str]:
        return {
            "model": self.name,
            "records": f"{self.questions.data} (SHA-256 {self.records.sha256[:16]}…)",
            "answers": f"greedy, at most {self.questions.max_new_tokens} tokens, {self.unended:,} cut there",
            "computed": f"on {self.device} in {self.dtype}, {self.questions.batch_size} at a time, "
            f"{self.seconds:.0f} s",
        }


def _numbers(score: Any) -> dict[str, Any]:
    return {"items": score.items, "exact": score.exact, "share": score.share, "interval": list(score.interval)}


def _name(kind: str | None) -> str:
    """A kind for the terminal, whatever characters a file has in it."""
    return "(no kind)" if kind is None else kind if kind.isprintable() else repr(kind)


def _cells(score: Any) -> list[str]:
    low, high = score.interval
    return [
        f"{score.items:,}",
        f"{score.exact:,}",
        f"{100 * score.share:.1f} %",
        f"{100 * low:.1f} – {100 * high:.1f} %",
    ]
