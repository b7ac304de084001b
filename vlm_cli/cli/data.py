"""`vlm data`: what is in files of records, before a model learns from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console, terminal
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.options import (
    ColumnsOption,
    ImageFolderOption,
    JsonOption,
    MaxPixelsOption,
    MediaRootOption,
    QuietOption,
    flatten_options,
)
from vlm_cli.cli.progress import ProgressLine
from vlm_cli.cli.prompts import ChatTemplateOption, SpecialTokensOption
from vlm_cli.data.histogram import Distribution
from vlm_cli.data.mixture import Mixture
from vlm_cli.data.records import Reading
from vlm_cli.data.summary import Example, Summary, summarize
from vlm_cli.errors import DataError, UsageError
from vlm_cli.printable import count_of, escape_controls
from vlm_cli.prompt import Medium

if TYPE_CHECKING:
    from vlm_cli.data.shown import Piece
    from vlm_cli.training.measuring import RecordMeasure

__all__ = ["data"]

_BAR = 40  # columns of the longest bar
_MOST_NAMED = 3  # sizes and ids that a line names
_MOST_SHOWN = 1_000


@dataclass(frozen=True)
class ModelOptions:
    """The model for which lengths are counted."""

    model: Annotated[
        str | None,
        option(
            "Model",
            "Count tokens and positions for MODEL, and refuse rows that it cannot learn. Without it, characters are "
            "counted.",
            "--model",
            "-m",
            metavar="MODEL",
            autocompletion=complete_models,
        ),
    ] = None
    chat_template: ChatTemplateOption = "auto"
    special_tokens: SpecialTokensOption = False
    trust_remote_code: Annotated[
        bool, option("Model", "Run the language model's own code from the directory of MODEL.", "--trust-remote-code")
    ] = False

    def make_measure(self) -> RecordMeasure | None:
        """Read the model's configuration and tokenizer, and no weights; None without a model.

        Raises:
            VLMError: if it is no model, or has no tokenizer.
        """
        if self.model is None:
            if self.chat_template != "auto" or self.special_tokens:
                flag = "--special-tokens" if self.special_tokens else "--chat-template"
                raise UsageError(f"{flag} needs --model, whose tokens it changes.")
            return None
        from vlm_cli.models import load_meta_model, read_processor_of, resolve_built_model
        from vlm_cli.quiet import silence_libraries
        from vlm_cli.training.measuring import RecordMeasure
        from vlm_cli.training.preparing import RecordPreparer
        from vlm_cli.writing.choice import TemplateChoice
        from vlm_cli.writing.writer import PromptWriter

        chosen, trust = resolve_built_model(self.model), self.trust_remote_code
        silence_libraries()
        vlm, _, processor = load_meta_model(chosen, trust_remote_code=trust)
        processor = processor or read_processor_of(chosen, trust_remote_code=trust)
        choice = TemplateChoice.parse(self.chat_template)
        writer = PromptWriter(processor, choice, parse_special_tokens=self.special_tokens)
        return RecordMeasure(RecordPreparer(vlm, processor, writer))


@flatten_options
def data(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Records: JSON lines, a JSON array, Parquet, Arrow, tar shards, a directory, hf:ORG/NAME, a mixture "
            "(YAML), or - for stdin.",
        ),
    ],
    columns: ColumnsOption = None,
    image_folder: ImageFolderOption = None,
    media_root: MediaRootOption = None,
    max_pixels: MaxPixelsOption = None,
    models: ModelOptions = ModelOptions(),
    show: Annotated[
        int,
        option(
            "Output", "Show N rows, drawn at random, as the model learns them.", min=0, max=_MOST_SHOWN, metavar="N"
        ),
    ] = 0,
    seed: Annotated[
        int, option("Output", "Draw the rows to show with this seed.", min=0, max=2**32 - 1, metavar="N")
    ] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in files of records: formats, pictures, turns, lengths, and rows that cannot be used.

    A row is read as `vlm train` reads it. Of pictures and clips, vlm reads the headers. The exit code is 1 if a row
    cannot be used.

    Example: vlm data llava.json --image-folder images --model my-vlm --show 3
    """
    mixture = Mixture.of(files)
    measure = models.make_measure()
    reading = Reading.of(media_root, max_pixels, image_folder, columns)
    found: list[Summary] = []
    done = count(1)
    with ProgressLine(None, noun="rows", has_summary=False) as progress:
        for source, ingredient in zip(mixture.open(), mixture.ingredients, strict=True):
            of_source = ingredient.refine(reading)
            summary = summarize(
                source, of_source, measure=measure, show=show, seed=seed, report=lambda: progress.show(next(done))
            )
            found.append(summary)
    if as_json:
        console.print_json({"model": models.model, "sources": [x.to_dict() for x in found]})
    else:
        weights = mixture.weights or [None] * len(found)
        for summary, weight in zip(found, weights, strict=True):
            _print(summary, weight)
    for note in [] if measure is None else measure.notes:
        console.note(note)
    _check(found)


def _check(found: Sequence[Summary]) -> None:
    """Say, after all numbers, how many rows cannot be used.

    Raises:
        DataError: if there are any, or no rows at all.
    """
    bad, good = sum(x.num_problems for x in found), sum(x.rows for x in found)
    if empty := [x.source.quoted for x in found if not x.rows + x.num_problems]:
        raise DataError(f"{empty[0]} holds no records.")
    if bad:
        raise DataError(f"{bad:,} of {count_of(bad + good, 'row')} cannot be used, and `vlm train` would refuse them.")


def _print(summary: Summary, weight: float | None) -> None:
    """Print what a source holds, each section below its title."""
    console.print_section(summary.source.name, _facts(summary, weight))
    if summary.num_problems:
        _print_problems(summary)
    counted = {"Pictures": summary.images, "Clips": summary.clips, "Answers": summary.turns}
    for name, counts in counted.items():
        if len(counts) > 1:
            _print_bars(f"{name} of a row", [(x.label, x.count) for x in Distribution(list(counts.elements())).bins()])
    for name, values in summary.lengths.items():
        distribution = Distribution(values)
        title = (
            f"{name.capitalize()} of a row: {distribution.quantile(0):,} to {distribution.quantile(1):,}, "
            f"median {distribution.quantile(0.5):,}, mean {distribution.mean:,.1f}"
        )
        if name in ("positions", "characters") and len(values) > 1:
            _print_bars(title, [(x.label, x.count) for x in distribution.bins()])
        else:
            console.print_line(title)
            console.print_line("")
    for note in summary.notes:
        console.note(note)
    for example in summary.examples:
        _print_example(example)


def _print_problems(summary: Summary) -> None:
    """Print the rows that cannot be used, each reason once with the rows that have it."""
    places: dict[str, list[str]] = {}
    for problem in summary.problems:
        places.setdefault(problem.message, []).append(f"{problem.unit} {problem.line} of {problem.shard}")
    console.print_line("Rows that cannot be used")
    for message, of_message in places.items():
        more = len(of_message) - _MOST_NAMED
        others = f" and {more} more" if more > 0 else ""
        console.print_line(f"  {', '.join(of_message[:_MOST_NAMED])}{others}")
        for line in console.wrapped(message, 4):
            console.print_line(line)
    if more := summary.num_problems - len(summary.problems):
        console.print_line(f"  … and {count_of(more, 'more row')}")
    console.print_line("")


def _facts(summary: Summary, weight: float | None) -> list[tuple[str, str]]:
    """Return rows of a name and a text."""
    source = summary.source
    formats = summary.formats.most_common()
    rows = f"{summary.rows:,}"
    if summary.num_problems:
        rows += f", and {summary.num_problems:,} that cannot be used"
    facts = [
        ("kind", ", ".join(x for x in (source.kind, source.detail) if x)),
        ("format", ", ".join(name if len(formats) == 1 else f"{count:,} {name}" for name, count in formats) or "none"),
        ("rows", rows),
        ("pictures", _describe_media(summary.images, "pictures")),
    ]
    if summary.sizes:
        facts.append(("sizes", _describe_sizes(summary.sizes)))
    if set(summary.clips) - {0}:
        facts.append(("clips", _describe_media(summary.clips, "clips")))
    facts.append(("answers", f"{sum(number * count for number, count in summary.turns.items()):,}"))
    if summary.systems:
        facts.append(("system", f"says something in {count_of(summary.systems, 'row')}"))
    if summary.ids:
        facts.append(("ids", _describe_ids(summary)))
    if weight is not None:
        facts.append(("share", f"{100 * weight:.1f} % of the records that are drawn"))
    return facts


def _describe_media(counts: Counter[int], noun: str) -> str:
    total = sum(number * count for number, count in counts.items())
    with_some = sum(count for number, count in counts.items() if number)
    if not total:
        return "none"
    without = f"; {count_of(counts[0], 'row')} without {noun}" if counts[0] else ""
    return f"{total:,} in {count_of(with_some, 'row')}{without}"


def _describe_sizes(sizes: Counter[tuple[int, int]]) -> str:
    """Name the sizes, or the most frequent one and the least and the greatest by pixels."""
    if len(sizes) <= _MOST_NAMED:
        return ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
    by_pixels = sorted(sizes, key=lambda size: size[0] * size[1])
    (width, height), count = sizes.most_common(1)[0]
    least, most = by_pixels[0], by_pixels[-1]
    return (
        f"{len(sizes):,} different, {least[0]} x {least[1]} to {most[0]} x {most[1]} pixels; "
        f"{width} x {height} most often ({count:,})"
    )


def _describe_ids(summary: Summary) -> str:
    repeated = summary.repeated
    if not repeated:
        return f"{len(summary.ids):,}, each used once"
    named = ", ".join(f"{name!r} {count} times" for name, count in list(repeated.items())[:_MOST_NAMED])
    more = ", …" if len(repeated) > _MOST_NAMED else ""
    return f"{len(summary.ids):,}, of which {len(repeated):,} in several rows: {named}{more}"


def _print_bars(title: str, rows: Sequence[tuple[str, int]]) -> None:
    """Print a bar for each number, as long as the share of the largest."""
    largest = max(count for _, count in rows)
    labels, counts = (max(len(x) for x in column) for column in ([r[0] for r in rows], [f"{r[1]:,}" for r in rows]))
    console.print_line(title)
    for label, number in rows:
        bar = "█" * round(_BAR * number / largest) or ("▏" if number else "")
        console.print_line(f"  {label:>{labels}}  {number:>{counts},}  {bar}".rstrip())
    console.print_line("")


def _print_example(example: Example) -> None:
    """Print a record as the model sees it: what is learned stands between ⟦ and ⟧, and on a terminal in green."""
    record, measured = example.record, example.measured
    name = "" if record.id == f"{record.unit} {record.line}" else f" ({record.id!r})"
    length = f": {measured.tokens:,} tokens, {measured.learned:,} learned" if measured else ""
    console.print_line(f"{record.place}{name}{length}")
    text = "".join(_write_piece(piece) for piece in example.pieces)
    terminal.write_styled("".join(f"    {line}\n" for line in text.split("\n")))
    console.print_line("")


def _write_piece(piece: Piece) -> str:
    from vlm_cli.media import short_name

    if isinstance(piece.content, Medium):
        return f"<{piece.content.kind}:{short_name(piece.content.source)}>"
    text = escape_controls(piece.content.text, "\n")
    return console.styled(f"⟦{text}⟧", "green") if piece.is_learned else text
