"""The formats of `vlm export`: one table, and the function that exports a model.

Importing this module does not import torch: `vlm export --help` lists the formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.errors import UnknownNameError, UsageError
from vlm_cli.files import EXPORT_FILE, replacing_directory, reserved_directory
from vlm_cli.manifest import recording
from vlm_cli.registry import suggest
from vlm_cli.version import __version__

if TYPE_CHECKING:
    from vlm_cli.modeling.config import VLMConfig
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = ["FORMATS", "OLD_NAMES", "ExportFormat", "ExportSettings", "export_model", "find_format"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What a writer may need besides the model.

    Attributes:
        name: name of the directory.
        source: directory of the model; no directory if the model is on the hub.
        max_shard_size: largest size of one weight file, such as "5GB".
        trust_remote_code: whether the language model's own code may run.
        shim: whether the directory of a VLM gets the file through which Transformers opens it.
        out_type: type of the weights in GGUF files.
        check: whether llama.cpp reads GGUF files and is compared with the model.
        verbose: whether a refusal tells of every class of Transformers, and not of the nearest alone.
    """

    name: str
    source: Path
    max_shard_size: str = "5GB"
    trust_remote_code: bool = False
    shim: bool = True
    out_type: str = "f16"
    check: bool = True
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A kind of directory that `vlm export` writes.

    Attributes:
        summary: what the directory holds.
        check: raises a UsageError if a model of this configuration cannot be written so; called before weights load,
            with `verbose` as in `ExportSettings`.
        write: writes the files into an existing directory, and returns facts about them.
        next_line: what to type next, with `{out}` for the directory and the names of facts that `write` returns.
        is_vlm: whether the directory is itself a VLM, which `vlm` loads.
    """

    summary: str
    check: Callable[..., None]
    write: Callable[[VLM, VLMProcessor, Path, ExportSettings], dict[str, Any]]
    next_line: str
    is_vlm: bool = False


def _accept(config: VLMConfig, *, verbose: bool = False) -> None:
    """Every model can be written so."""


def _check_hf(config: VLMConfig, name: str | None = None, *, verbose: bool = False) -> None:
    from vlm_cli.checkpoint.export.hf.write import check_hf

    check_hf(config, name, verbose=verbose)


def _check_program(config: VLMConfig, *, verbose: bool = False) -> None:
    from vlm_cli.checkpoint.export.programs import check_program

    check_program(config)


def _check_onnx(config: VLMConfig, *, verbose: bool = False) -> None:
    from vlm_cli.checkpoint.export.programs import check_onnx, check_program

    check_program(config)
    check_onnx()


def _write_language_model(model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings) -> dict[str, Any]:
    from vlm_cli.checkpoint.export.language_model import export_language_model

    return export_language_model(model, processor, out, max_shard_size=settings.max_shard_size)


def _write_delta(model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings) -> dict[str, Any]:
    from vlm_cli.checkpoint.run_record import copy_run_record, keep_card, read_story
    from vlm_cli.checkpoint.saving import save_delta
    from vlm_cli.report.card import UNTRAINED

    copy_run_record(settings.source, out)
    facts = save_delta(
        model,
        processor,
        out,
        name=settings.name,
        story=read_story(settings.source, model) or UNTRAINED,
        max_shard_size=settings.max_shard_size,
        trust_remote_code=settings.trust_remote_code,
        shim=settings.shim,
    )
    keep_card(settings.source, out)
    return facts


def _check_merged(config: VLMConfig, *, verbose: bool = False) -> None:
    from vlm_cli.checkpoint.export.merged import check_merged

    check_merged(config)


def _write_full(model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings) -> dict[str, Any]:
    from vlm_cli.checkpoint.completing import write_whole

    how: dict[str, Any] = {"max_shard_size": settings.max_shard_size, "shim": settings.shim}
    write_whole(model, processor, out, str(settings.source), name=settings.name, **how)
    return {}


def _write_hf(
    model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings, name: str | None = None
) -> dict[str, Any]:
    from vlm_cli.checkpoint.export.hf.write import export_hf

    how: dict[str, Any] = {"max_shard_size": settings.max_shard_size, "verbose": settings.verbose}
    return export_hf(model, processor, out, name=name, **how)


def _check_gguf(config: VLMConfig, *, verbose: bool = False) -> None:
    from vlm_cli.checkpoint.export.gguf.checking import check_gguf

    check_gguf(config)


def _write_gguf(model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings) -> dict[str, Any]:
    from vlm_cli.checkpoint.export.gguf.exporting import export_gguf

    how: dict[str, Any] = {"out_type": settings.out_type, "check": settings.check}
    return export_gguf(model, processor, out, name=settings.name, **how)


def _write_torch_program(model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings) -> dict[str, Any]:
    from vlm_cli.checkpoint.export.programs import export_torch_program

    return export_torch_program(model, processor, out)


def _write_onnx(model: VLM, processor: VLMProcessor, out: Path, settings: ExportSettings) -> dict[str, Any]:
    from vlm_cli.checkpoint.export.programs import export_vision_onnx

    return export_vision_onnx(model, processor, out)


FORMATS: dict[str, ExportFormat] = {
    "language-model": ExportFormat(
        summary="the language model and its tokenizer, for Transformers",
        check=_accept,
        write=_write_language_model,
        next_line='AutoModelForCausalLM.from_pretrained("{out}")',
    ),
    "delta": ExportFormat(
        summary="the VLM without the tensors that its pretrained parts hold",
        check=_accept,
        write=_write_delta,
        next_line='vlm generate --model {out} --image FILE "A photo of"; vlm build WHOLE --from {out} makes it whole',
        is_vlm=True,
    ),
    "merged": ExportFormat(
        summary="the whole VLM, its adapters (vlm train --lora) added to the weights",
        check=_check_merged,
        write=_write_full,
        next_line='vlm generate --model {out} --image FILE "A photo of"',
        is_vlm=True,
    ),
    "hf": ExportFormat(
        summary="the whole model, for the class of Transformers that holds it",
        check=_check_hf,
        write=_write_hf,
        next_line='AutoModelForImageTextToText.from_pretrained("{out}")',
    ),
    "llava": ExportFormat(
        summary="as hf, for Transformers' LLaVA class alone",
        check=partial(_check_hf, name="llava"),
        write=partial(_write_hf, name="llava"),
        next_line='LlavaForConditionalGeneration.from_pretrained("{out}")',
    ),
    "gguf": ExportFormat(
        summary="the language model and the vision side as two GGUF files, for llama.cpp",
        check=_check_gguf,
        write=_write_gguf,
        next_line='llama-mtmd-cli -m {out}/{language_model} --mmproj {out}/{mmproj} --image FILE -p "What is it?"',
    ),
    "torch-export": ExportFormat(
        summary="the vision encoder and vision tokenizer, as a program of torch.export",
        check=_check_program,
        write=_write_torch_program,
        next_line='torch.export.load("{out}/vision.pt2").module()(pixels)',
    ),
    "vision-onnx": ExportFormat(
        summary="the vision encoder and vision tokenizer, as an ONNX graph",
        check=_check_onnx,
        write=_write_onnx,
        next_line='onnxruntime.InferenceSession("{out}/vision.onnx").run(None, {{"pixels": pixels}})',
    ),
}

#: Names of formats in earlier versions -> names now.
OLD_NAMES = {"vision-program": "torch-export"}


def find_format(name: str) -> ExportFormat:
    """Find a format by its name.

    Raises:
        UnknownNameError: if there is no such format.
    """
    if name not in FORMATS:
        raise UnknownNameError(f"unknown format {name!r}.{suggest(name, FORMATS)} Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def export_model(
    location: str,
    out: Path,
    name: str,
    *,
    source: str | None = None,
    max_shard_size: str = "5GB",
    shim: bool = True,
    out_type: str = "f16",
    check: bool = True,
    verbose: bool = False,
    trust_remote_code: bool = False,
    backbones: Mapping[str, str] | None = None,
    allow_hosts: Collection[str] = (),
    verify: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
    **hub: Any,
) -> dict[str, Any]:
    """Write a built model in another format, after comparing the outputs with those of the model.

    Args:
        location: directory or hub id of the model.
        out: the directory to write.
        name: a key of `FORMATS`.
        source: what the user called the model; None takes the location.
        max_shard_size: largest size of one weight file, such as "5GB".
        shim: whether the directory of a VLM gets the file through which Transformers opens it with `trust_remote_code`.
        out_type: type of the weights in GGUF files, a key of `OUT_TYPES`.
        check: whether llama.cpp reads GGUF files and is compared with the model.
        verbose: whether a refusal tells of every class of Transformers, and not of the nearest alone.
        trust_remote_code: whether the language model's own code may run.
        backbones: of a delta directory, part -> where its pretrained weights are, if the user says so.
        allow_hosts: hosts that backbones may come from.
        verify: whether to compare the hashes of all weight files with the manifest of the directory.
        overwrite: whether to replace a directory that vlm wrote.
        progress: called with the name of each step before it begins.
        hub: `revision`, … of Transformers' `from_pretrained`.

    Returns:
        Facts about what was written; `largest_difference` if outputs were compared.

    Raises:
        VLMError: if the model cannot be written so, the outputs differ, or `out` is the model's own directory.
    """
    chosen = find_format(name)
    if out.exists() and Path(location).exists() and out.samefile(location):
        raise UsageError(
            f"{str(out)!r} is the model that is exported, and OUT would take its place. Choose another OUT."
        )
    settings = ExportSettings(
        name=out.name,
        source=Path(location),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        shim=shim,
        out_type=out_type,
        check=check,
        verbose=verbose,
    )
    with reserved_directory(out, overwrite=overwrite):
        places = {"backbones": backbones, "allow_hosts": allow_hosts, "verify": verify}
        check_fit = partial(chosen.check, verbose=verbose)
        model, processor = _load(check_fit, location, source or location, trust_remote_code, places, progress, **hub)
        merged = _merge(model, progress)
        with replacing_directory(out, overwrite=overwrite) as unfinished:
            progress(f"exporting {name}")
            with recording(unfinished):
                facts = {**merged, **chosen.write(model, processor, unfinished, settings)}
            if not chosen.is_vlm:
                manifest = {"format": name, "model": source or location, "vlm_cli": __version__, **facts}
                (unfinished / EXPORT_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return facts


def _merge(model: VLM, progress: Callable[[str], None]) -> dict[str, Any]:
    """Merge the adapters of a model, of which no format but vlm's own knows anything."""
    if not model.config.adapters:
        return {}
    from vlm_cli.checkpoint.export.merged import merge_and_compare

    progress("merging adapters")
    return {"largest_difference": merge_and_compare(model)}


def _load(
    check: Callable[[VLMConfig], None],
    location: str,
    source: str,
    trust_remote_code: bool,
    places: Mapping[str, Any],
    progress: Callable[[str], None],
    **hub: Any,
) -> tuple[VLM, VLMProcessor]:
    """Load a model, after a check that the format can hold it."""
    from vlm_cli.checkpoint.directory import load, read_config

    progress("reading the configuration")
    check(read_config(location, trust_remote_code=trust_remote_code, **hub))
    progress(f"loading {source}")
    return load(location, trust_remote_code=trust_remote_code, **places, **hub)
