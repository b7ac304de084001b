"""Open published weights: a file, a directory or a hub id. Names and shapes are read first, tensors on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_cli.checkpoint.inside import check_folder, read_index
from vlm_cli.checkpoint.schemas.text_config import check_sizes
from vlm_cli.checkpoint.torch_files import describe_load_error, read_torch_file
from vlm_cli.checkpoint.whole import check_files, check_snapshot
from vlm_cli.errors import CheckpointError, first_line
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.lookalike import find_named
from vlm_cli.offline import use_cache_without_network
from vlm_cli.plain_data import read_json

__all__ = ["PublishedCheckpoint", "TensorInfo"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
#: Files that are fetched from a hub repository: weights, small files that describe them, and PyTorch's weight files.
_PLAIN_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "*.safetensors"]
_TORCH_PATTERNS = ["*.bin", "*.pt", "*.pth"]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape, dtype and file, known before the tensor is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


@dataclass(frozen=True)
class PublishedCheckpoint:
    """The named tensors in a checkpoint's files, and the configuration beside them.

    Attributes:
        name: the path or hub id that the user gave.
        folder: the directory of its files.
        tensors: name -> shape, dtype and file; `module.`, which data-parallel training puts before names, is removed.
        config: content of `config.json`; empty if there is no such file.
    """

    name: str
    folder: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, name: str, *, revision: str | None = None, token: str | None = None) -> PublishedCheckpoint:
        """Find a checkpoint's files, fetch them if `name` is a hub id, and read the names and shapes of their tensors.

        Args:
            name: file, directory or hub id.
            revision: branch, tag or commit of a hub id.
            token: for private repositories; None takes the token of `hf auth login`.

        Raises:
            CheckpointError: if there is no such checkpoint, or a file is damaged. Code inside a file is never run.
        """
        path = find_named(name)
        if not name or not path.exists():  # Path("") is the working directory
            path = _fetch(name, revision, token)
            check_folder(path)
            check_snapshot(path, name)
        elif path.is_dir():
            check_folder(path)
            check_files(path)
        files = [path] if path.is_file() else _weight_files(path, name)
        folder = path.parent if path.is_file() else path
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            found = _read_names(file)
            if twice := sorted(tensors.keys() & found.keys()):
                other = tensors[twice[0]].file.name
                raise CheckpointError(
                    f"{name!r} holds {len(twice)} tensors twice, e.g. {twice[0]!r} in {other} and in {file.name}. Give "
                    "the path of one file, or move the other file away."
                )
            tensors |= found
        if not tensors:
            raise CheckpointError(f"{name!r} holds no named tensors.")
        config = {} if path.is_file() and path.suffix != ".safetensors" else _read_config(folder)
        return cls(name, folder, tensors, config)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.tensors[name].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its floating-point numbers; float32 if it has none."""
        numbers: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                numbers[info.dtype] += torch.Size(info.shape).numel()
        return numbers.most_common(1)[0][0] if numbers else torch.float32

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor; of a PyTorch file, this takes the memory of the whole file.

        Raises:
            CheckpointError: if there is no such tensor, or its file is damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.name!r} holds no tensor {name!r}.")
        file = self.tensors[name].file
        try:
            return next(x for found, x in _read_tensors(file, name) if found == name)
        except (OSError, RuntimeError, StopIteration) as error:
            raise _damaged(file, error) from None

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Read all tensors with their names; one file is open at a time.

        Raises:
            CheckpointError: if a file is damaged.
        """
        for file in dict.fromkeys(info.file for info in self.tensors.values()):
            wanted = {name for name, info in self.tensors.items() if info.file == file}
            try:
                for name, tensor in _read_tensors(file):
                    if name in wanted:
                        yield name, tensor
            except (OSError, RuntimeError) as error:
                raise _damaged(file, error) from None


def _weight_files(folder: Path, name: str) -> list[Path]:
    """List a directory's weight files of one kind: the files that an index names, or else all of that kind.

    Raises:
        CheckpointError: if there are no weight files, or the index does not fit them.
    """
    for suffix in _SUFFIXES:
        if index := min(folder.glob(f"*{suffix}.index.json"), default=None):
            return _indexed_files(folder, name, index)
        if files := sorted(folder.glob(f"*{suffix}")):
            return files
    raise CheckpointError(f"{name!r} holds no weights: no file ends in {', '.join(_SUFFIXES)}.")


def _indexed_files(folder: Path, name: str, index: Path) -> list[Path]:
    """List the weight files that an index names.

    Raises:
        CheckpointError: if a file is missing, or the index names a tensor that no file holds.
    """
    weight_map = read_index(index)
    files = [folder / file for file in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{name!r} lacks {len(missing)} of the {len(files)} weight files that {index.name} names, e.g. "
            f"{missing[0]!r}. Fetch them again."
        )
    held = {tensor for file in files for tensor in _read_names(file)}
    stripped = {tensor: _strip(tensor) for tensor in weight_map}
    if absent := sorted(tensor for tensor, bare in stripped.items() if bare not in held):
        raise CheckpointError(
            f"{index.name} of {name!r} names {len(absent)} tensors that are in no file, e.g. {absent[0]!r}. The "
            "index belongs to other files; fetch both again."
        )
    return files


def _read_names(file: Path) -> dict[str, TensorInfo]:
    """Read the names, shapes and dtypes of a file's tensors.

    Raises:
        CheckpointError: if the file is damaged, or its dtype is not supported.
    """
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
                            f"{name!r} in {str(file)!r} has dtype {dtype}, which vlm does not read. Give weights that "
                            "are not quantized."
                        )
                    found[_strip(name)] = TensorInfo(shape, _DTYPES[dtype], file)
            return found
        return {name: TensorInfo(tuple(x.shape), x.dtype, file) for name, x in _read_tensors(file)}
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(file, error) from None


def _read_tensors(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read a file's tensors with their names; a PyTorch file may hold nothing else, since no code in it is run.

    Args:
        file: the file.
        only: the tensor that is needed; a safetensors file leaves the others on the disk.
    """
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                if only in (None, _strip(name)):
                    yield _strip(name), opened.get_tensor(name)
        return
    state = read_torch_file(file)
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    for name, x in state.items() if isinstance(state, Mapping) else ():
        if isinstance(x, Tensor):
            yield _strip(str(name)), x


def _strip(name: str) -> str:
    """Remove the prefix that data-parallel training puts before names."""
    return name.removeprefix("module.")


#: safetensors' name of a dtype -> torch's.
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
    """Make the error for a file that cannot be read."""
    if file.suffix == ".safetensors":
        return CheckpointError(f"cannot read weights from {str(file)!r}: {describe_load_error(error)}. Is it complete?")
    return CheckpointError(
        f"cannot read weights from {str(file)!r}: {describe_load_error(error)}. vlm reads only tensors from a file, "
        "never code."
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    config = _read_json(file)
    check_sizes(config, repr(str(file)))
    return config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(file)!r}: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{str(file)!r} does not hold a JSON object.")
    return data


def _fetch(name: str, revision: str | None, token: str | None) -> Path:
    """Fetch the files of a hub repository; PyTorch's weight files only if it has no safetensors.

    Raises:
        CheckpointError: if `name` is no hub id, or the files cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or not is_hub_id(name):
        raise CheckpointError(f"there is no file or directory {name!r}. Give a path, or a hub id (ORG/NAME).")
    use_cache_without_network()
    try:
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_PLAIN_PATTERNS))
        if not any(folder.rglob("*.safetensors")):
            patterns = [*_PLAIN_PATTERNS, *_TORCH_PATTERNS]
            folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        return folder
    except Exception as error:
        raise CheckpointError(
            f"cannot fetch {name!r}: there is no such file or directory, and the Hugging Face hub did not send it "
            f"({first_line(error)}). If this machine is offline, copy the cache (HF_HOME) here, or give a local path."
        ) from None
