"""Directories that run alone: written whole or not at all, loaded offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from vlm_cli.errors import CheckpointError, PluginError, first_line
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS

__all__ = [
    "load",
    "read_config",
    "read_generation_config",
    "read_processor",
    "read_tensors",
    "save",
]

COMPOSITION_FILE = "composition.yaml"


def save(
    model: Any,
    processor: Any,
    out: Path,
    *,
    card: str = "",
    max_shard_size: str = "5GB",
    delta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model's files into the directory `out`.

    Args:
        model: a `VLM`.
        processor: its `VLMProcessor`.
        out: an existing directory.
        card: text of the model card.
        max_shard_size: bytes of one weight file, as "5GB".
        delta: leave out the tensors of pretrained parts, with these arguments of `write_delta`; None writes all.

    Returns:
        What `write_delta` tells.

    Raises:
        VLMError: if the disk is full, or a delta cannot be made.
    """
    from vlm_cli.checkpoint.parts.remote_code import write_code

    write_code(model.lang_model, out)
    told: dict[str, Any] = {}
    try:
        if delta is None:
            model.save_pretrained(out, max_shard_size=max_shard_size)
        else:
            from vlm_cli.checkpoint.delta import write_delta

            told = write_delta(model, out, max_shard_size=max_shard_size, **delta)
    except SafetensorError as error:
        # A full disk reaches us under this name.
        raise CheckpointError(f"cannot write the weights: {error}. Nothing was changed.") from None
    processor.save_pretrained(out)
    composition = yaml.safe_dump(model.config.composition.to_dict(), sort_keys=False)
    (out / COMPOSITION_FILE).write_text(composition, encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")
    return told


def read_config(name: str, *, trust_remote_code: bool = False, **keywords: Any) -> Any:
    """The `VLMConfig` of a directory or hub id.

    Raises:
        CheckpointError: if there is none.
    """
    from vlm_cli.checkpoint.parts.remote_code import adopt_from_directory
    from vlm_cli.modeling.config import VLMConfig

    try:
        data, _ = VLMConfig.get_config_dict(name, **keywords)
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from None
    if not data:
        raise CheckpointError(f"{name!r} is no VLM: it has no config.json. `vlm build` writes one.")
    if data.get("model_type") != "vlm":
        raise CheckpointError(
            f"{name!r} holds a model of type {data.get('model_type')!r}, not a VLM of ours. To compose one with it: "
            f"vlm build OUT --family flamingo --language-model {name}. To import a published one: vlm build OUT --from "
            f"{name}"
        )
    try:
        _check_parts(name, data)
        adopt_from_directory(data.get("text_config") or {}, name, trusted=trust_remote_code, **keywords)
        config = VLMConfig.from_dict(data)  # whose composition may be of another version
        return config
    except (CheckpointError, PluginError):
        raise
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from None


def _check_parts(name: str, data: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: if the model was built with parts of packages that are not installed.
    """
    composition = data.get("composition") or {}
    types = {
        VISION_ENCODERS: (data.get("vision_config") or {}).get("type"),
        VISION_TOKENIZERS: (composition.get("vision_tokenizer") or {}).get("type"),
        FUSIONS: (composition.get("fusion") or {}).get("type"),
    }
    missing = [f"{registry.kind} {x!r}" for registry, x in types.items() if x is not None and x not in registry]
    if missing:
        raise CheckpointError(
            f"cannot load {name!r}: this environment lacks what it was built with: {', '.join(missing)}. Install the "
            "package that provides it, and run the same command again."
        )


def load(
    name: str,
    *,
    dtype: Any = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    backbones: Mapping[str, str] | None = None,
    **keywords: Any,
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the processor of a directory or hub id.

    Args:
        name: directory that `vlm build` wrote, or a hub id.
        dtype: of the weights; "auto" is that of the files.
        device: where the model goes; a `device_map` among the keywords takes its place.
        trust_remote_code: run the language model's own code from the directory.
        backbones: of a delta directory, by part: where they are, if not where they were.
        keywords: `revision`, `token`, `local_files_only`, … of Transformers.

    Raises:
        CheckpointError: if it cannot be read or lacks tensors.
    """
    from vlm_cli.modeling.vlm import VLM

    config = read_config(name, trust_remote_code=trust_remote_code, **keywords)
    processor = read_processor(name, **keywords)
    if getattr(config, "backbones", None):
        return _load_delta(name, config, dtype, trust_remote_code, backbones, keywords).to(device), processor
    if backbones:
        raise CheckpointError(f"{name!r} is no delta directory, so backbones have no place. Leave them out.")
    try:
        model, info = VLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
        )
    except PluginError:
        raise
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise CheckpointError(
            f"the weights in {name!r} do not cover the model: {len(info['missing_keys'])} tensors are missing, "
            f"{len(info['mismatched_keys'])} have another shape, {len(info['unexpected_keys'])} are not known; "
            f"e.g. {sorted(map(str, wrong))[0]}."
        )
    if "device_map" not in keywords:
        return model.eval().to(device), processor
    if any(p.is_meta for p in model.vision_encoder.parameters()):
        # What is on disk comes when a module's `forward` is called, and OpenCLIP's towers read weights elsewhere too.
        raise CheckpointError(
            "the vision encoder cannot run from disk. Keep it in memory: device_map={'vision_encoder': 'cpu', …}."
        )
    return model.eval(), processor


def _load_delta(
    name: str,
    config: Any,
    dtype: Any,
    trust_remote_code: bool,
    backbones: Mapping[str, str] | None,
    keywords: Mapping[str, Any],
) -> Any:
    from vlm_cli.checkpoint.delta import assemble

    known = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")
    if other := [key for key in keywords if key not in known]:
        raise CheckpointError(
            f"{name!r} is a delta directory, which is put together without {', '.join(other)}. Leave it out, or make a "
            "full directory: model.save_pretrained(…) of the loaded model."
        )
    model = assemble(name, config, dtype=dtype, trust_remote_code=trust_remote_code, places=backbones, **keywords)
    model.generation_config = read_generation_config(name, **keywords) or model.generation_config
    return model.eval()


def read_processor(name: str, **keywords: Any) -> Any:
    """The `VLMProcessor` of a directory or hub id.

    Raises:
        CheckpointError: if it cannot be read.
    """
    from vlm_cli.processor import VLMProcessor

    try:
        return VLMProcessor.from_pretrained(name, **keywords)
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from None


def read_generation_config(name: str, **keywords: Any) -> Any:
    """How a directory or hub id ends and samples its answers; None if it does not say."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name, **keywords)
    except OSError:
        return None


def read_tensors(
    name: str, tensors: Sequence[str], *, file: str = "model.safetensors", **keywords: Any
) -> dict[str, Any]:
    """A few tensors of a directory or cached hub id, without the rest; keys lose the name of their part.

    Args:
        name: directory or hub id.
        tensors: their names.
        file: the weights, or what they are called where there are several files.
        keywords: `revision`, … of Transformers.

    Raises:
        CheckpointError: if one is missing.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    if not tensors:
        return {}
    try:
        index = cached_file(name, f"{file}.index.json", _raise_exceptions_for_missing_entries=False, **keywords)
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
        found = {}
        for tensor in tensors:
            shard = cached_file(name, weight_map.get(tensor, file), **keywords)
            with safe_open(shard, "pt") as opened:
                found[tensor.partition(".")[2]] = opened.get_tensor(tensor)
        return found
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from None


def _cannot_load(name: str, error: Exception) -> str:
    message = f"cannot load {name!r}: {first_line(error)}."
    if not Path(name).is_dir():
        message += " Give a directory that `vlm build` wrote or a hub id; an offline machine knows only cached ones."
    return message
