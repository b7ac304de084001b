"""`vlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_cli.checkpoint.export.formats import FORMATS, OLD_NAMES, export_model, find_format
from vlm_cli.checkpoint.export.gguf.types import OUT_TYPES, check_out_type
from vlm_cli.cli import console
from vlm_cli.cli.completion import complete_models, offer
from vlm_cli.cli.options import (
    JsonOption,
    MaxShardSizeOption,
    NoShimOption,
    OverwriteOption,
    QuietOption,
    SourceOptions,
    check_shard_size,
    flatten_options,
)
from vlm_cli.errors import UsageError
from vlm_cli.models import resolve_built_model

__all__ = ["export"]

_OUT_TYPES_HELP = "; ".join(f"{name}: {x}" for name, x in OUT_TYPES.items())
_FORMATS_HELP = "; ".join(f"{name}: {x.summary}" for name, x in FORMATS.items())


@flatten_options
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory or hub id of a built model, or demo.",
            show_default=False,
            autocompletion=complete_models,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help=f"What to write. {_FORMATS_HELP}.",
            show_default=False,
            autocompletion=offer(lambda: {name: x.summary for name, x in FORMATS.items()}),
        ),
    ],
    source: SourceOptions = SourceOptions(),
    max_shard_size: MaxShardSizeOption = "5GB",
    no_shim: NoShimOption = False,
    out_type: Annotated[
        str,
        typer.Option(
            "--outtype",
            metavar="TYPE",
            help=f"With --format gguf, the type of the weights. {_OUT_TYPES_HELP}.",
            autocompletion=offer(lambda: OUT_TYPES),
        ),
    ] = "f16",
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="With --format gguf, do not compare llama.cpp with the model, which takes memory for both.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="With --format hf, if no class of Transformers holds the model, tell of every class what stands in "
            "the way, not only of the nearest.",
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model in a format that other programs read. Some formats hold only a part of the model.

    vlm compares the outputs with those of the model before it writes OUT.

    Example: vlm export my-model their-model --format hf
    """
    if kind in OLD_NAMES:
        console.notify(f"Note: the format {kind} is now called {OLD_NAMES[kind]}.")
        kind = OLD_NAMES[kind]
    chosen = find_format(kind)
    check_shard_size(max_shard_size)
    out_type = out_type.lower()
    check_out_type(out_type)
    if kind != "gguf" and out_type != "f16":
        raise UsageError(f"--outtype is for --format gguf; the format is {kind}. Leave --outtype out.")
    if kind != "gguf" and no_check:
        raise UsageError(f"--no-check is for --format gguf; the format is {kind}. Leave --no-check out.")
    location = resolve_built_model(model, source.revision)
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    with console.announced_steps(quiet) as announce:
        facts = export_model(
            location,
            out,
            kind,
            source=model,
            max_shard_size=max_shard_size,
            shim=not no_shim,
            out_type=out_type,
            check=not no_check,
            verbose=verbose,
            trust_remote_code=source.trust_remote_code,
            backbones=source.backbones,
            allow_hosts=source.allow_hosts,
            verify=source.verify,
            overwrite=overwrite,
            progress=announce,
            **source.hub,
        )
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    if as_json:
        console.print_json({"output": str(out), "model": model, "format": kind, **facts, "files": files})
    else:
        console.print_table(("File", "Bytes"), [[name, f"{size:,}"] for name, size in files.items()])
    if "largest_difference" in facts:
        console.notify(f"Compared with the model: they differ by {facts['largest_difference']:.1e} at most.")
    if "largest_pixel_levels" in facts:
        console.notify(
            "Pixels are equal with the Pillow backend of the image processor; with torchvision, Transformers' default, "
            f"they differ by {facts['largest_pixel_levels']:.0f} of 255 levels at most."
        )
    for note in facts.get("notes", ()):
        console.notify(f"Note: {note}")
    console.notify(f"Wrote {out}. Next: {chosen.next_line.format(out=out, **facts)}")
