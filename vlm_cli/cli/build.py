"""`vlm build`."""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import MAX_SEED, ComposeOptions, JsonOption, expand, resolve_dtype
from vlm_cli.errors import CheckpointError, UsageError

__all__ = ["build"]


@expand
def build(
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)] = None,
    compose: ComposeOptions = ComposeOptions(),
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights to load over the composition: .safetensors, or .pt of tensors.")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Draw all weights; fetch none.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (the language model's), float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the weights that are drawn.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of one weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if vlm wrote it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, count, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compose a VLM, load its pretrained parts, and write a directory that runs alone.

    Example: vlm build my-flamingo --family flamingo --vision-encoder ViT-B-32:openai --language-model ./my-llama
    """
    if out is None and not dry_run:
        raise UsageError("no output directory is named: vlm build OUT …, or add --dry-run to write nothing.")
    wanted = resolve_dtype(dtype)
    _check_size(max_shard_size)
    composition = compose.compose()
    if out is not None:
        from vlm_cli.checkpoint.directory import check_output

        check_output(out, overwrite=overwrite)
    from vlm_cli.checkpoint.create import plan
    from vlm_cli.cli.models import hush

    hush()
    with console.step(quiet) as announce:
        announce("checking the composition")
        blueprint = plan(composition, trust_remote_code=compose.trust_remote_code)
        if dry_run and weights is not None:
            _load_weights(blueprint.meta_model, blueprint, weights, random_weights)
        elif not dry_run:
            assert out is not None
            model = _create(blueprint, announce, weights, random_weights, wanted, seed)
            _write(model, blueprint, out, announce, max_shard_size, overwrite)
    _report(blueprint if dry_run else model, None if dry_run else out, as_json, wanted)
    if not random_weights and not dry_run and blueprint.tower.weights is None and weights is None:
        console.note(
            f"Note: vision encoder {composition.vision_encoder.name!r} names no pretrained weights, so it was drawn at "
            "random. Give a tag, as in ViT-B-32:laion2b_s34b_b79k."
        )
    if not dry_run:
        console.note(f'Wrote {out}. Next: vlm generate --model {shlex.quote(str(out))} --image FILE "A photo of"')


def _check_size(text: str) -> None:
    """
    Raises:
        UsageError: for what Transformers cannot read as a size.
    """
    if not re.fullmatch(r"[1-9]\d*\s*[kKMGT]i?B", text):
        raise UsageError(f"--max-shard-size expects a number of MB or GB, as 5GB or 500MB, got {text!r}.")


def _create(blueprint: Any, announce: Any, weights: Path | None, random_weights: bool, dtype: Any, seed: int) -> Any:
    from vlm_cli.checkpoint.create import create
    from vlm_cli.checkpoint.weights import read_weights

    if weights is not None:
        read_weights(weights)  # before anything is fetched
    model = create(blueprint, random_weights=random_weights, dtype=dtype, seed=seed, progress=announce)
    if weights is not None:
        announce(f"loading weights {weights}")
        _load_weights(model, blueprint, weights, random_weights)
    return model


def _load_weights(model: Any, blueprint: Any, weights: Path, random_weights: bool) -> None:
    """Load trained weights and print what became of each tensor.

    Raises:
        CheckpointError: if one is missing that trains or would stay random, or has another shape.
    """
    from vlm_cli.checkpoint.weights import load_weights

    drawn = ["vision_encoder"] if random_weights or blueprint.tower.weights is None else []
    report = load_weights(model, weights, random_parts=[*drawn, "language_model"] if random_weights else drawn)
    _print_key_report(report)
    if not report.is_complete:
        raise CheckpointError(
            f"{str(weights)!r} does not fit the composition: {len(report.missing)} tensors that train, or would "
            f"stay random, are missing, and {len(report.mismatched)} have another shape. Nothing was written."
        )


def _print_key_report(report: Any) -> None:
    shapes = [f"{name}: file {a}, model {b}" for name, (a, b) in report.mismatched.items()]
    for title, names in (
        ("loaded", report.loaded),
        ("expected to be absent (frozen, from a pretrained part)", report.absent),
        ("missing", report.missing),
        ("not used", report.unused),
        ("of another shape", shapes),
    ):
        shown = f": {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names and title != "loaded" else ""
        console.note(f"  {len(names)} tensors {title}{shown}")


def _write(model: Any, blueprint: Any, out: Path, announce: Any, max_shard_size: str, overwrite: bool) -> None:
    from vlm_cli.checkpoint.directory import replacing, save
    from vlm_cli.cli.card import model_card

    announce(f"writing {out}")
    with replacing(out, overwrite=overwrite) as partial:
        save(model, blueprint.processor, partial, card=model_card(model, out.name), max_shard_size=max_shard_size)


def _report(source: Any, out: Path | None, as_json: bool, dtype: Any) -> None:
    from vlm_cli.cli.count_params import _cells
    from vlm_cli.report.parameters import count_parameters

    model = source if out is not None else source.meta_model
    stored = None if out is not None else (source.config.get_text_config().dtype if dtype == "auto" else dtype)
    report = count_parameters(model, dtype=stored)
    if as_json:
        data = {"output": None if out is None else str(out), "composition": model.config.composition}
        console.print_json({**data, **report.to_dict()})
        return
    heads = ("Part", "Parameters", "Trainable", "Frozen", "Share", f"Bytes ({report.dtype})")
    console.print_table(heads, [_cells(row) for row in (*report.rows, report.total)], total=True)
