"""`vlm build`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli import models
from vlm_cli.cli import console
from vlm_cli.cli.options import MAX_SEED, ComposeOptions, JsonOption, check_shard_size, flatten_options, resolve_dtype
from vlm_cli.errors import CheckpointError, UsageError

__all__ = ["build"]


@flatten_options
def build(
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)] = None,
    compose: ComposeOptions = ComposeOptions(),
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="Published weights: a file, a directory or a hub id."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights to load over the composition: .safetensors, or .pt of tensors.")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Draw all weights; fetch none.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (the language model's), float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the weights that are drawn.")] = 0,
    delta: Annotated[
        bool, typer.Option("--delta", help="Leave out what the pretrained parts hold; note where they are.")
    ] = False,
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
    check_shard_size(max_shard_size)
    if source is not None and (weights is not None or random_weights):
        raise UsageError("--from brings the weights, so --weights and --random-weights have no place. Leave them out.")
    if delta and random_weights:
        raise UsageError(
            "--delta leaves out what pretrained parts hold, and --random-weights loads none. Leave one out; a full "
            "directory becomes one later: vlm export OUT OTHER --format delta."
        )
    keywords = {"trust_remote_code": compose.trust_remote_code} if delta else None
    output = None if out is None or dry_run else _Output(out, max_shard_size, overwrite, keywords)
    composition = None if source is not None else models.compose(compose.request)
    if out is not None:
        from vlm_cli.files import check_directory

        check_directory(out, overwrite=overwrite)
    if source is not None:
        _import(source, output, compose, wanted, seed, quiet, as_json)
        return
    assert composition is not None
    from vlm_cli.checkpoint.create import plan
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    with console.announced_steps(quiet) as announce:
        announce("checking the composition")
        blueprint = plan(composition, trust_remote_code=compose.trust_remote_code)
        if dry_run and weights is not None:
            _load_weights(blueprint.meta_model, blueprint, weights, random_weights)
        elif output is not None:
            model = _create(blueprint, announce, weights, random_weights, wanted, seed)
            output.write(model, blueprint.processor, announce)
    if output is None:
        stored = blueprint.config.get_text_config().dtype if wanted == "auto" else wanted
        _report(blueprint.meta_model, None, as_json, stored)
    else:
        _report(model, out, as_json)
    if not random_weights and output is not None and blueprint.tower.weights is None and weights is None:
        console.notify(
            f"Note: vision encoder {composition.vision_encoder.name!r} names no pretrained weights, so it was drawn at "
            "random. Give a tag, as in ViT-B-32:laion2b_s34b_b79k."
        )
    if output is not None:
        output.tell()


@dataclass(frozen=True)
class _Output:
    """The directory that is written."""

    path: Path
    max_shard_size: str
    overwrite: bool
    delta: dict[str, Any] | None  # arguments of `write_delta`; None writes all tensors

    def write(self, model: Any, processor: Any, announce: Any) -> None:
        from vlm_cli.checkpoint.directory import save, save_delta
        from vlm_cli.files import replacing_directory

        announce(f"writing {self.path}")
        keywords: dict[str, Any] = {"name": self.path.name, "max_shard_size": self.max_shard_size}
        with replacing_directory(self.path, overwrite=self.overwrite) as partial:
            if self.delta is None:
                save(model, processor, partial, **keywords)
            else:
                save_delta(model, processor, partial, **keywords, **self.delta, progress=announce)

    def tell(self) -> None:
        name = shlex.quote(str(self.path))
        console.notify(f'Wrote {self.path}. Next: vlm generate --model {name} --image FILE "A photo of"')


def _import(
    source: str, output: _Output | None, compose: ComposeOptions, dtype: Any, seed: int, quiet: bool, as_json: bool
) -> None:
    """Build a directory from published weights; without an output, only say what would become of them.

    Raises:
        VLMError: if they are not known, damaged, or do not cover the model.
    """
    from vlm_cli.checkpoint.published.importing import import_checkpoint
    from vlm_cli.checkpoint.published.recognising import recognise
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    with console.announced_steps(quiet) as announce:
        announce(f"finding {source}")
        recognised = recognise(source, revision=compose.revision)
        if output is not None and output.delta is not None and recognised.holds_all_backbones:
            raise UsageError(
                f"--delta leaves out what pretrained parts hold, and {recognised.checkpoint.name!r} brings a vision "
                "encoder and a language model of its own. Leave --delta out."
            )
        imported = import_checkpoint(
            recognised,
            composition_over=compose.request.compose_over,
            dtype=dtype,
            trust_remote_code=compose.trust_remote_code,
            seed=seed,
            progress=announce,
        )
        console.notify(f"Layout: {imported.layout.name} ({imported.layout.source})")
        for note in imported.notes:
            console.notify(f"Note: {note}")
        _print_key_report(imported.report)
        if any(name.startswith("added_tokens.") for name in imported.report.absent):
            console.notify(
                "  the checkpoint has no rows for added tokens: they start at the mean of the language model's"
            )
        if imported.model is None:
            raise CheckpointError(
                f"{source!r} does not fit the composition: {len(imported.report.missing)} tensors that train, or would "
                f"stay random, are missing, and {len(imported.report.mismatched)} have another shape. Nothing was "
                "written."
            )
        if output is not None:
            output.write(imported.model, imported.processor, announce)
    path = None if output is None else output.path
    _report(imported.model, path, as_json, layout=imported.layout.name, keys=imported.report.to_dict())
    if output is not None:
        output.tell()


def _create(blueprint: Any, announce: Any, weights: Path | None, random_weights: bool, dtype: Any, seed: int) -> Any:
    from vlm_cli.checkpoint.create import create
    from vlm_cli.checkpoint.weights import open_weights

    if weights is not None:
        open_weights(weights)  # before anything is fetched
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
        console.notify(f"  {len(names)} tensors {title}{shown}")


def _report(model: Any, out: Path | None, as_json: bool, dtype: Any = None, **more: Any) -> None:
    """The parameters of what was built, or would be; `dtype` is that of a model without weights."""
    from vlm_cli.report.parameters import count_parameters
    from vlm_cli.report.tables import parameter_heads, parameter_rows

    report = count_parameters(model, dtype=dtype)
    if as_json:
        data = {"output": None if out is None else str(out), "composition": model.config.composition.to_dict()}
        console.print_json({**data, **more, **report.to_dict()})
        return
    console.print_table(parameter_heads(report), parameter_rows(report), total=True)
