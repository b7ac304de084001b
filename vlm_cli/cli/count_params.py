"""`vlm count-params`."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_dtypes
from vlm_cli.cli.loading import notify_of_random_tower
from vlm_cli.cli.options import (
    DTYPES,
    OUTPUT,
    ComposeOptions,
    ExactOption,
    JsonOption,
    ModelArgument,
    flatten_options,
    resolve_dtype,
)
from vlm_cli.errors import UsageError
from vlm_cli.models import load_meta_model, resolve
from vlm_cli.report.tables import human_bytes, parameters_markdown

if TYPE_CHECKING:
    from vlm_cli.report.parameters import ParameterReport

__all__ = ["count_params"]


@flatten_options
def count_params(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    depth: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=100, help="Levels of the table: 1 lists the parts, 2 also their modules, and so on."
        ),
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            metavar=DTYPES,
            help="Dtype in which bytes are counted; auto takes that of the weights.",
            autocompletion=complete_dtypes,
        ),
    ] = "auto",
    memory: Annotated[
        bool, option(OUTPUT, "Print what the weights take as they are and with each --quantize.", "--memory")
    ] = False,
    exact: ExactOption = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, option(OUTPUT, "Print comma-separated values.", "--csv")] = False,
    as_markdown: Annotated[bool, option(OUTPUT, "Print a Markdown table.", "--markdown")] = False,
) -> None:
    """Count the parameters of each part. No weight is downloaded or loaded.

    Example: vlm count-params flamingo --vision-encoder ViT-L-14 --language-model ./my-llama
    """
    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown exclude each other. Choose one.")
    if memory and (as_csv or as_markdown or depth > 1):
        raise UsageError("--memory prints a table of the parts. Leave out --csv, --markdown and --depth.")
    chosen = resolve(model, compose.request)
    from vlm_cli.checkpoint.delta import count_delta_bytes
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.report.parameters import count_memory, count_parameters

    wanted = resolve_dtype(dtype)
    silence_libraries()
    vlm, stored, _ = load_meta_model(chosen, trust_remote_code=compose.trust_remote_code, revision=compose.revision)
    dtype_of_weights = stored if isinstance(wanted, str) else wanted
    notify_of_random_tower(chosen)
    if memory:
        _print_memory(count_memory(vlm, dtype_of_weights), as_json)
        return
    report = count_parameters(vlm, depth=depth, dtype=dtype_of_weights)
    size = count_delta_bytes(vlm, dtype_of_weights)
    if as_json:
        console.print_json({**report.to_dict(), "delta_bytes": size})
    elif as_csv:
        _print_csv(report)
    elif as_markdown:
        console.print_lines(parameters_markdown(report))
    else:
        console.print_parameters(report, exact)
        console.print_line(f"A delta directory (build --delta) holds {human_bytes(size)} of tensors once trained.")


def _print_memory(memory: dict[str, dict[str, int]], as_json: bool) -> None:
    if as_json:
        console.print_json({"bytes": memory})
        return
    rows = [[part, *(human_bytes(sizes[part]) for sizes in memory.values())] for part in next(iter(memory.values()))]
    rows.append(["total", *(human_bytes(sum(sizes.values())) for sizes in memory.values())])
    console.print_table(["part", *memory], rows, total=True)


def _print_csv(report: ParameterReport) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "parameters", "trainable", "frozen", "share", "bytes", "adapter"))
    for row in (*report.rows, report.total):
        writer.writerow(
            [row.name, row.parameters, row.trainable, row.frozen, f"{row.share:.6f}", row.bytes, row.adapter]
        )
    console.print_lines(text.getvalue())
