"""Published weights where they are: a file, a directory or a hub id; names and shapes first, tensors when asked for."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_cli.errors import CheckpointError, first_line

__all__ = ["PublishedCheckpoint", "TensorInfo"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
#: What is fetched of a hub repository: weights, and the small files that say what they are.
_WANTED = ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Named tensors in files, and the configuration beside them.

    Attributes:
        name: what the user called it.
        folder: where its files are.
        tensors: by name, without the wrappers of training code.
        config: content of `config.json`; empty if there is none.
    """

    name: str
    folder: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, name: str, *, revision: str | None = None, token: str | None = None) -> PublishedCheckpoint:
        """Find the files of a checkpoint and read what they hold, without reading a tensor of a safetensors file.

        Raises:
            CheckpointError: if it is not there, or a file is damaged. Code inside of a file is never run.
        """
        path = Path(name).expanduser()
        if not name or not path.exists():  # an empty name would be the working directory
            path = _fetch(name, revision, token)
        files = [path] if path.is_file() else _weight_files(path, name)
        folder = path.parent if path.is_file() else path
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            found = _names(file)
            if twice := sorted(tensors.keys() & found.keys()):
                other = tensors[twice[0]].file.name
                raise CheckpointError(
                    f"{name!r} holds {len(twice)} tensors twice, e.g. {twice[0]!r} in {other} and in {file.name}. Name "
                    "the file that is meant, or move the other one away."
                )
            tensors |= found
        if not tensors:
            raise CheckpointError(f"{name!r} holds no named tensors.")
        config = {} if path.is_file() and path.suffix != ".safetensors" else _config(folder)
        return cls(name, folder, tensors, config)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its numbers."""
        numbers: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                numbers[info.dtype] += torch.Size(info.shape).numel()
        return numbers.most_common(1)[0][0] if numbers else torch.float32

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file by file, of which one is open at a time.

        Raises:
            CheckpointError: if a file is damaged.
        """
        for file in dict.fromkeys(info.file for info in self.tensors.values()):
            mine = {name for name, info in self.tensors.items() if info.file == file}
            try:
                for name, tensor in _tensors(file):
                    if name in mine:
                        yield name, tensor
            except (OSError, RuntimeError) as error:
                raise _damaged(file, error) from None


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The weight files of a directory, of one kind; those that an index of that kind names, if there is one.

    Raises:
        CheckpointError: if there are none, or one that the index names is missing.
    """
    for suffix in _SUFFIXES:
        if index := min(folder.glob(f"*{suffix}.index.json"), default=None):
            return _indexed_files(folder, name, index)
        if files := sorted(folder.glob(f"*{suffix}")):
            return files
    raise CheckpointError(f"{name!r} holds no weights: no file ends in {', '.join(_SUFFIXES)}.")


def _indexed_files(folder: Path, name: str, index: Path) -> list[Path]:
    """
    Raises:
        CheckpointError: if one that the index names is missing, or holds other tensors.
    """
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"the index {str(index)!r} names no tensors. Fetch it again.")
    files = [folder / file for file in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{name!r} lacks {len(missing)} of the {len(files)} weight files that {index.name} names, e.g. "
            f"{missing[0]!r}. Fetch them again."
        )
    held = {tensor for file in files for tensor in _names(file)}
    stripped = {tensor: _stripped(tensor) for tensor in weight_map}
    if absent := sorted(tensor for tensor, bare in stripped.items() if bare not in held):
        raise CheckpointError(
            f"{index.name} of {name!r} names {len(absent)} tensors that are in no file, e.g. {absent[0]!r}. The "
            "index belongs to other files; fetch both again."
        )
    return files


def _names(file: Path) -> dict[str, TensorInfo]:
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            found = {}
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    if dtype not in _DTYPES:
                        raise CheckpointError(
                            f"{name!r} in {str(file)!r} has dtype {dtype}, which is not read. Take weights that are "
                            "not quantized."
                        )
                    found[_stripped(name)] = TensorInfo(shape, _DTYPES[dtype], file)
            return found
        return {name: TensorInfo(tuple(x.shape), x.dtype, file) for name, x in _tensors(file)}
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(file, error) from None


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                yield _stripped(name), opened.get_tensor(name)
        return
    # Files of torch before 1.6 are not zip files, and cannot be mapped into memory.
    state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    for name, x in state.items() if isinstance(state, Mapping) else ():
        if isinstance(x, Tensor):
            yield _stripped(str(name)), x


def _stripped(name: str) -> str:
    """A name without what data-parallel training puts before it."""
    return name.removeprefix("module.")


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _damaged(file: Path, error: Exception) -> CheckpointError:
    if file.suffix == ".safetensors":
        return CheckpointError(f"cannot read weights from {str(file)!r}: {first_line(error)}. Is it complete?")
    what = first_line(error)
    if isinstance(error, pickle.UnpicklingError) and not what.startswith("it holds"):
        what = "it is no complete file of tensors"  # torch's own words advise to run what is inside
    return CheckpointError(
        f"cannot read weights from {str(file)!r}: {what}. Only tensors are read from it, never code."
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return _json(file) if file.is_file() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(file)!r}: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{str(file)!r} does not hold a mapping.")
    return data


def _fetch(name: str, revision: str | None, token: str | None) -> Path:
    """The files of a hub repository, of which torch's own are left out where there are safetensors."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import HFValidationError

    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise CheckpointError(f"there is no file or directory {name!r}. Give one, or a hub id (ORG/NAME).")
    patterns = list(_WANTED)
    try:
        try:
            files = HfApi().list_repo_files(name, revision=revision, token=token)
            if any(file.endswith(".safetensors") for file in files):
                patterns = [x for x in patterns if not x.endswith((".bin", ".pt", ".pth"))]
        except HFValidationError:
            raise
        except Exception:  # offline: what is in the cache is what there is
            pass
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"cannot fetch {name!r}: it is no file or directory here, and the hub did not give it "
            f"({first_line(error)}). If this machine is offline, copy the cache (HF_HOME), or give a local path."
        ) from None
