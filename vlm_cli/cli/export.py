"""`vlm export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import JsonOption, SourceOptions, flatten_options
from vlm_cli.errors import UnknownNameError
from vlm_cli.models import resolve_built_model
from vlm_cli.registry import suggest

__all__ = ["FORMATS", "export"]

#: What a model can become, and the line that says what to do with it.
FORMATS = {
    "language-model": 'AutoModelForCausalLM.from_pretrained("{out}")',
    "delta": 'vlm generate --model {out} --image FILE "A photo of"',
    "llava": 'LlavaForConditionalGeneration.from_pretrained("{out}")',
    "vision-program": 'torch.export.load("{out}/vision.pt2").module()(pixels)',
    "vision-onnx": 'onnxruntime.InferenceSession("{out}/vision.onnx").run(None, {{"pixels": pixels}})',
}


@flatten_options
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, or demo.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    kind: Annotated[str, typer.Option("--format", "-f", help=f"One of {', '.join(FORMATS)}.", show_default=False)],
    source: SourceOptions = SourceOptions(),
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of one weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if vlm wrote it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as what other programs run; the outputs are compared before OUT is there.

    Example: vlm export my-llava their-llava --format llava
    """
    if kind not in FORMATS:
        raise UnknownNameError(f"unknown format {kind!r}.{suggest(kind, FORMATS)} Known: {', '.join(FORMATS)}.")
    from vlm_cli.cli.build import check_size

    check_size(max_shard_size)
    built = resolve_built_model(model, source.revision)
    from vlm_cli.files import check_directory

    check_directory(out, overwrite=overwrite)
    from vlm_cli.checkpoint.directory import load, read_config
    from vlm_cli.checkpoint.export.programs import write_mark
    from vlm_cli.files import replacing_directory
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    with console.announced_steps(quiet) as announce:
        announce("reading the configuration")
        config = read_config(built, trust_remote_code=source.trust_remote_code, **source.hub)
        write = _writer(kind, config, max_shard_size, source.trust_remote_code, out.name)
        announce(f"loading {model}")
        vlm, processor = load(built, trust_remote_code=source.trust_remote_code, **source.hub)
        with replacing_directory(out, overwrite=overwrite) as partial:
            announce(f"exporting {kind}")
            facts = write(vlm, processor, partial)
            if kind != "delta":
                write_mark(partial, kind, model, facts)
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    if as_json:
        console.print_json({"output": str(out), "model": model, "format": kind, **facts, "files": files})
    else:
        console.print_table(("File", "Bytes"), [[name, f"{size:,}"] for name, size in files.items()])
    if "largest_difference" in facts:
        console.notify(f"Compared with the model: they differ by {facts['largest_difference']:.1e} at most.")
    console.notify(f"Wrote {out}. Next: {FORMATS[kind].format(out=out)}")


def _writer(kind: str, config: Any, max_shard_size: str, trust_remote_code: bool, name: str) -> Any:
    """The function that writes a format, once it is known that the model can be written so.

    Raises:
        UsageError: if it cannot.
    """
    from functools import partial

    from vlm_cli.checkpoint.export import programs as formats

    if kind == "llava":
        from vlm_cli.checkpoint.export.llava import check_llava, export_llava

        check_llava(config)
        return partial(export_llava, max_shard_size=max_shard_size)
    if kind == "delta":
        return partial(_write_delta, name, max_shard_size, trust_remote_code)
    if kind == "language-model":
        return partial(formats.export_language_model, max_shard_size=max_shard_size)
    if kind == "vision-onnx":
        formats.check_onnx()
        return formats.export_vision_onnx
    return formats.export_vision_program


def _write_delta(
    name: str, max_shard_size: str, trust_remote_code: bool, model: Any, processor: Any, out: Path
) -> dict[str, Any]:
    from vlm_cli.checkpoint.directory import save_delta

    return save_delta(
        model, processor, out, name=name, max_shard_size=max_shard_size, trust_remote_code=trust_remote_code
    )
