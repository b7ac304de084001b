"""`vlm sweep`: what each composition of a grid costs."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.completion import complete_subjects
from vlm_cli.cli.options import JsonOption, QuietOption, flatten_options
from vlm_cli.cli.sweep_options import CsvOption, MarkdownOption, SetOption, TrustOption
from vlm_cli.errors import UsageError
from vlm_cli.sweeps.candidates import Base, make_candidates
from vlm_cli.sweeps.dimensions import parse_dimension
from vlm_cli.training.settings import TrainingSettings

__all__ = ["sweep"]


@flatten_options
def sweep(
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE",
            help="A family or a composition file, which all compositions begin with.",
            show_default=False,
            autocompletion=complete_subjects,
        ),
    ] = None,
    set: SetOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Compare compositions: what each one is, and what it costs. No weight is downloaded.

    A composition whose values do not fit each other stands in the table with the reason.

    Example: vlm sweep base.yaml --set vision_tokenizer=linear,perceiver --set fusion=language-stream,cross-attention
    """
    if base is None:
        raise UsageError("no BASE is given: vlm sweep BASE --set NAME=VALUE,VALUE")
    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown exclude each other. Choose one.")
    dimensions = [parse_dimension(text) for text in set or ()]
    candidates = make_candidates(Base.read(base), dimensions, TrainingSettings())
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.sweeps.overview import look_at
    from vlm_cli.sweeps.tables import overview_table

    silence_libraries()
    rows = list(look_at(candidates, trust_remote_code=trust_remote_code))
    if as_json:
        console.print_json({"base": base, "compositions": [row.to_dict() for row in rows]})
        return
    table = overview_table(rows)
    if as_csv:
        console.print_lines(table.to_csv())
    elif as_markdown:
        console.print_lines(table.to_markdown())
    else:
        console.print_table(table.short_heads, table.short_rows)
        for note in table.notes:
            console.print_line(note)
