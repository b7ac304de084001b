"""Directories that run alone: written whole or not at all, loaded offline."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vlm_cli.errors import CheckpointError, OutputExistsError, PluginError, first_line
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS

__all__ = [
    "check_output",
    "is_vlm_directory",
    "load",
    "read_config",
    "read_generation_config",
    "read_processor",
    "read_tensors",
    "replacing",
    "save",
]

COMPOSITION_FILE = "composition.yaml"


def is_vlm_directory(path: Path) -> bool:
    """Whether `vlm build` wrote this directory."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "vlm"
    except (OSError, ValueError, AttributeError):
        return False


def check_output(out: Path, *, overwrite: bool) -> None:
    """
    Raises:
        OutputExistsError: if `out` may not be written.
        CheckpointError: if its folder is not there.
    """
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputExistsError(f"{str(out)!r} is the working directory or holds it. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {str(out)!r}: the folder {str(out.absolute().parent)!r} does not exist.")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputExistsError(f"{str(out)!r} exists. Choose another name, or add --overwrite to replace it.")
    if not out.is_dir() or (any(out.iterdir()) and not is_vlm_directory(out)):
        raise OutputExistsError(
            f"{str(out)!r} is not a directory that vlm wrote, so --overwrite does not replace it. Choose another name."
        )


@contextmanager
def replacing(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        OutputExistsError: if `out` may not be written.
        CheckpointError: if the disk is full or the folder cannot be written.
    """
    check_output(out, overwrite=overwrite)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.absolute().parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {str(out)!r}: {error.strerror}.") from None
    try:
        yield partial
        _open_to_others(partial)
        _swap(partial, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(out)!r}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        os.rename(new, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.absolute().parent))
    try:
        os.rename(out, old / out.name)
        os.rename(new, out)
    finally:
        if not out.exists():
            os.rename(old / out.name, out)
        shutil.rmtree(old, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Give a folder the usual permissions: mkdtemp and safetensors make what only its owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def save(model: Any, processor: Any, out: Path, *, card: str = "", max_shard_size: str = "5GB") -> None:
    """Write a model's files into the directory `out`.

    Args:
        model: a `VLM`.
        processor: its `VLMProcessor`.
        out: an existing directory.
        card: text of the model card.
        max_shard_size: bytes of one weight file, as "5GB".
    """
    from safetensors import SafetensorError

    from vlm_cli.checkpoint.remote_code import write_code

    write_code(model.lang_model, out)
    try:
        model.save_pretrained(out, max_shard_size=max_shard_size)
    except SafetensorError as error:
        # A full disk reaches us under this name.
        raise CheckpointError(f"cannot write the weights: {error}. Nothing was changed.") from None
    processor.save_pretrained(out)
    composition = yaml.safe_dump(model.config.composition, sort_keys=False)
    (out / COMPOSITION_FILE).write_text(composition, encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")


def read_config(name: str, *, trust_remote_code: bool = False, **keywords: Any) -> Any:
    """The `VLMConfig` of a directory or hub id.

    Raises:
        CheckpointError: if there is none.
    """
    from vlm_cli.checkpoint.remote_code import adopt_from_directory
    from vlm_cli.modeling.vlm import VLMConfig

    try:
        data, _ = VLMConfig.get_config_dict(name, **keywords)
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from None
    if not data:
        raise CheckpointError(f"{name!r} is no VLM: it has no config.json. `vlm build` writes one.")
    if data.get("model_type") != "vlm":
        raise CheckpointError(
            f"{name!r} holds a model of type {data.get('model_type')!r}, not a VLM. To compose one with it: "
            f"vlm build OUT --family flamingo --language-model {name}"
        )
    try:
        _check_parts(name, data)
        adopt_from_directory(data.get("text_config") or {}, name, trusted=trust_remote_code, **keywords)
        config = VLMConfig.from_dict(data)
        config.parts  # noqa: B018 — reads the composition, which may be of another version
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
    name: str, *, dtype: Any = "auto", device: str = "cpu", trust_remote_code: bool = False, **keywords: Any
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the processor of a directory or hub id.

    Args:
        name: directory that `vlm build` wrote, or a hub id.
        dtype: of the weights; "auto" is that of the files.
        device: where the model goes.
        trust_remote_code: run the language model's own code from the directory.
        keywords: `revision`, `token`, `local_files_only`, … of Transformers.

    Raises:
        CheckpointError: if it cannot be read or lacks tensors.
    """
    from vlm_cli.modeling.vlm import VLM

    config = read_config(name, trust_remote_code=trust_remote_code, **keywords)
    processor = read_processor(name, **keywords)
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
    return model.eval().to(device), processor


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


def read_tensors(name: str, tensors: Sequence[str], **keywords: Any) -> dict[str, Any]:
    """A few tensors of a directory or cached hub id, without the rest; keys lose the name of their part.

    Raises:
        CheckpointError: if one is missing.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    if not tensors:
        return {}
    try:
        index = cached_file(
            name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **keywords
        )
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
        found = {}
        for tensor in tensors:
            shard = cached_file(name, weight_map.get(tensor, "model.safetensors"), **keywords)
            with safe_open(shard, "pt") as file:
                found[tensor.partition(".")[2]] = file.get_tensor(tensor)
        return found
    except Exception as error:
        raise CheckpointError(_cannot_load(name, error)) from None


def _cannot_load(name: str, error: Exception) -> str:
    message = f"cannot load {name!r}: {first_line(error)}."
    if not Path(name).is_dir():
        message += " Give a directory that `vlm build` wrote or a hub id; an offline machine knows only cached ones."
    return message
