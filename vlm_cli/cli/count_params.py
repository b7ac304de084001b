"""`vlm count-params`."""

import csv
import sys
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import ComposeOptions, JsonOption, ModelArgument, flatten_options, resolve_dtype
from vlm_cli.errors import UsageError
from vlm_cli.models import resolve

__all__ = ["count_params"]

COLUMNS = ("part", "parameters", "trainable", "frozen", "share", "bytes")


@flatten_options
def count_params(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    depth: Annotated[int, typer.Option(min=1, help="1 for parts, 2 for their modules, …")] = 1,
    dtype: Annotated[str, typer.Option(help="Count bytes as auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Count the parameters of each part, without allocating or downloading a weight.

    Example: vlm count-params flamingo --vision-encoder ViT-L-14 --language-model ./my-llama
    """
    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown exclude each other. Choose one.")
    chosen = resolve(model, compose.request)
    from vlm_cli.checkpoint.delta import delta_bytes
    from vlm_cli.models import load_meta_model
    from vlm_cli.quiet import silence_libraries
    from vlm_cli.report.parameters import count_parameters
    from vlm_cli.report.tables import human_bytes, parameter_heads, parameter_rows, parameters_markdown

    wanted = resolve_dtype(dtype)
    silence_libraries()
    vlm, stored, _ = load_meta_model(chosen, trust_remote_code=compose.trust_remote_code, revision=compose.revision)
    dtype_of_weights = stored if wanted == "auto" else wanted
    report = count_parameters(vlm, depth=depth, dtype=dtype_of_weights)
    size = delta_bytes(vlm, dtype_of_weights)
    if as_json:
        console.print_json({**report.to_dict(), "delta_bytes": size})
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_values(row) for row in (*report.rows, report.total))
    elif as_markdown:
        print(parameters_markdown(report), end="")
    else:
        console.print_table(parameter_heads(report), parameter_rows(report), total=True)
        print(f"A delta directory (build --delta) holds {human_bytes(size)} of tensors once trained.")


def _values(row: Any) -> list[Any]:
    return [row.name, row.parameters, row.trainable, row.frozen, f"{row.share:.6f}", row.bytes]
