"""`vlm build`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli import models
from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_dtypes
from vlm_cli.cli.options import (
    DTYPES,
    MAX_SEED,
    OUTPUT,
    ComposeOptions,
    ExactOption,
    JsonOption,
    MaxShardSizeOption,
    NoShimOption,
    OverwriteOption,
    QuietOption,
    check_shard_size,
    flatten_options,
    resolve_dtype,
)
from vlm_cli.errors import UsageError
from vlm_cli.files import check_directory
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from vlm_cli.checkpoint.building import BuildResult, IncompleteWeightsError
    from vlm_cli.checkpoint.published.fill import KeyReport

__all__ = ["build"]

WEIGHTS = "Weights"  # heading of `--help`


@flatten_options
def build(
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)] = None,
    compose: ComposeOptions = ComposeOptions(),
    source: Annotated[
        str | None,
        option(
            WEIGHTS,
            "Import a published VLM: its weight file, directory or hub id. Its composition is read from it; the "
            "composition flags change it, and replace parts of it.",
            "--from",
            metavar="CHECKPOINT",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        option(
            WEIGHTS,
            "Load trained weights over the composition: a .safetensors file, or a .pt file that holds only tensors.",
            metavar="FILE",
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        option(WEIGHTS, "Give all parts random weights. Nothing is downloaded.", "--random-weights"),
    ] = False,
    dtype: Annotated[
        str,
        option(
            WEIGHTS,
            "Dtype of all weights; auto takes that of the language model, or of CHECKPOINT.",
            metavar=DTYPES,
            autocompletion=complete_dtypes,
        ),
    ] = "auto",
    seed: Annotated[
        int,
        option(WEIGHTS, "Seed for weights that start at random.", metavar="N", min=0, max=MAX_SEED),
    ] = 0,
    delta: Annotated[
        bool,
        option(
            OUTPUT,
            "Write a small directory: leave out the tensors of pretrained parts, and note where these parts are.",
            "--delta",
        ),
    ] = False,
    max_shard_size: MaxShardSizeOption = "5GB",
    no_shim: NoShimOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool,
        option(OUTPUT, "Check that the parts fit and count parameters. Write nothing.", "--dry-run"),
    ] = False,
    exact: ExactOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compose a VLM and write it as a directory. The directory holds all parts and runs alone.

    Example: vlm build my-flamingo --family flamingo --vision-encoder ViT-B-32:openai --language-model ./my-llama
    """
    if out is None and not dry_run:
        raise UsageError("no output directory is named: vlm build OUT …, or add --dry-run to write nothing.")
    keywords: dict[str, Any] = {
        "out": None if dry_run else out,
        "dtype": resolve_dtype(dtype),
        "seed": seed,
        "delta": delta,
        "trust_remote_code": compose.trust_remote_code,
        "max_shard_size": max_shard_size,
        "shim": not no_shim,
        "overwrite": overwrite,
    }
    check_shard_size(max_shard_size)
    if source is not None and (weights is not None or random_weights):
        raise UsageError("--from brings all weights. Leave --weights and --random-weights out.")
    composition = None if source is not None else models.compose(compose.request)
    if out is not None:
        check_directory(out, overwrite=overwrite)
    from vlm_cli.checkpoint import building
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    try:
        with console.announced_steps(quiet) as announce:
            if composition is not None:
                result = building.build(
                    composition, weights=weights, random_weights=random_weights, progress=announce, **keywords
                )
            else:
                assert source is not None
                result = building.build_from_checkpoint(
                    source,
                    composition_over=compose.request.compose_over,
                    revision=compose.revision,
                    progress=announce,
                    **keywords,
                )
    except building.IncompleteWeightsError as error:
        _print_account(error)
        raise
    _print_account(result)
    for part in ("vision_tokenizer", "fusion") if source is not None else ():
        if (named := getattr(compose, part)) is not None and part not in result.replaced:
            flag, words = f"--{part.replace('_', '-')} {named}", part.replace("_", " ")
            console.notify(f"Note: {flag} names the type of the checkpoint's own {words}, so nothing is replaced.")
    _print_result(result, as_json, exact)


def _print_account(result: BuildResult | IncompleteWeightsError) -> None:
    """Print on stderr how the weights were named, what became of each tensor, and notes."""
    if result.layout is not None:
        console.notify(f"Layout: {result.layout.name} ({result.layout.source})")
    if result.keys is not None:
        _print_key_report(result.keys)
    for note in result.notes:
        console.notify(f"Note: {note}")


def _print_key_report(report: KeyReport) -> None:
    shapes = [f"{name}: file {a}, model {b}" for name, (a, b) in report.mismatched.items()]
    for title, names in (
        ("loaded", report.loaded),
        ("expected to be absent (frozen, from a pretrained part)", report.absent),
        ("missing", report.missing),
        ("not used", report.unused),
        ("of another shape", shapes),
        *([("of replaced parts left out", report.replaced), ("new", report.new)] if report.new else []),
    ):
        shown = f": {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names and title != "loaded" else ""
        console.notify(f"  {count_of(len(names), 'tensor')} {title}{shown}")


def _print_result(result: BuildResult, as_json: bool, exact: bool) -> None:
    """Print the parameters of what was built, and what to type next."""
    if as_json:
        data: dict[str, Any] = {
            "output": None if result.out is None else str(result.out),
            "composition": result.model.config.composition.to_dict(),
        }
        if result.layout is not None and result.keys is not None:
            data |= {"layout": result.layout.name, "keys": result.keys.to_dict()}
        console.print_json({**data, **result.parameters.to_dict()})
    else:
        console.print_parameters(result.parameters, exact)
    if result.out is not None:
        name = shlex.quote(str(result.out))
        console.notify(f'Wrote {result.out}. Next: vlm generate --model {name} --image FILE "A photo of"')
