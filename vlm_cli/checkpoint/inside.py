"""Names that a file gives to other files: each must lie inside the directory of the file that names it.

`resolve_inside` is the only way from such a name to a path. It refuses absolute paths, `..`, links that lead out of the
directory, and whatever is no plain file: opening a pipe can wait for ever, and a device may never end. The hub's cache
stores the files of a repository as links into its `blobs`; these links are allowed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import read_json

__all__ = ["check_folder", "check_index", "check_named_files", "read_index", "resolve_inside"]

#: Endings of the files that vlm, Transformers and OpenCLIP read from a model's directory.
_READ = (".json", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf", ".model", ".txt", ".jinja", ".py", ".yaml")

MAX_INDEX = 256 * 2**20  # bytes of an index; a real one has about 100 for each tensor


def resolve_inside(folder: Path, name: object, *, named_by: str) -> Path:
    """Return the path of a file that another file names. The file may be missing.

    Args:
        folder: the directory that must hold it.
        name: as the other file has it.
        named_by: what messages call the other file, such as "model.safetensors.index.json".

    Raises:
        CheckpointError: if the name leads out of the directory, or to what is no plain file.
    """
    if not isinstance(name, str) or not _is_plain_name(name):
        raise CheckpointError(
            f"{named_by} in {str(folder)!r} names the file {_shorten(name)}, and may name only files inside of its "
            "directory: no absolute path and no '..'. If you trust it, copy that file into the directory and change "
            "the name."
        )
    path = folder / name
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return path
        status = None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    if not _is_inside(path, folder):
        raise CheckpointError(
            f"{str(path)!r} is a link that leads out of its directory, to {os.path.realpath(path)!r}. If you trust it, "
            "put a copy of that file in the place of the link."
        )
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{str(path)!r} is {_describe(status.st_mode)}, and a file is needed. Fetch it again.")
    return path


def check_folder(folder: Path) -> None:
    """Check that what loaders read from a directory is files inside of it; nothing is opened.

    Raises:
        CheckpointError: for a link that leads out of the directory, a pipe or a device.
    """
    try:
        entries = [x for x in os.scandir(folder) if x.name.endswith(_READ) and not x.is_file(follow_symlinks=False)]
    except OSError:
        return  # whoever reads the directory says so
    for entry in sorted(entries, key=lambda x: x.name):
        if not (entry.is_dir(follow_symlinks=False)):
            resolve_inside(folder, entry.name, named_by="the directory")


def check_named_files(settings: Mapping[str, Any], named_by: str) -> None:
    """Check that settings such as `vocab_file` name no file of this machine: older versions of Transformers open it.

    A path that leads nowhere may stay from the machine of the tokenizer's author; nothing can be read there.

    Args:
        settings: content of tokenizer_config.json.
        named_by: what messages call that file.

    Raises:
        CheckpointError: for an absolute path, or one with "..", of something that exists.
    """
    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str) and not _is_plain_name(value) and _exists(value):
            raise CheckpointError(
                f"{named_by} names the file {_shorten(value)} ({key}), and may name only files inside of its "
                "directory. If you trust it, copy that file into the directory, and delete the key."
            )


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(path))
    except ValueError:  # a null character
        return False


def check_index(name: str, keywords: Mapping[str, Any]) -> None:
    """Check the names in the indexes of a model's weight files, which Transformers follows wherever they lead.

    Args:
        name: directory or hub id.
        keywords: of Transformers' `from_pretrained`; those that say where files are have an effect.

    Raises:
        CheckpointError: if an index names a file outside of its directory.
    """
    from transformers.utils.hub import cached_file

    from vlm_cli.trust import HUB_ARGUMENTS

    places = {key: x for key, x in keywords.items() if key in HUB_ARGUMENTS}
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            index = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **places)
        except Exception:  # loading the weights says what is wrong with the directory or the connection
            return
        if index is not None:
            read_index(Path(index))


def read_index(index: Path) -> dict[str, str]:
    """Read an index of weight files: tensor -> name of a file that is inside of the index's directory.

    Raises:
        CheckpointError: if the index cannot be read, or names another file.
    """
    try:
        data = read_json(index, most_bytes=MAX_INDEX)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the index {str(index)!r}: {error}. Fetch it again.") from None
    weight_map: Any = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"the index {str(index)!r} names no tensors. Fetch it again.")
    _check_all(index.parent, weight_map.values(), index.name)
    return weight_map


def _check_all(folder: Path, names: Iterable[Any], named_by: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or name not in seen:
            resolve_inside(folder, name, named_by=named_by)
            seen.add(name)


def _is_plain_name(name: str) -> bool:
    """Tell whether a name stays below its directory on every system, links aside.

    >>> [_is_plain_name(x) for x in ("a.bin", "sub/a.bin", "../a", "/a", "C:\\\\a", "a/../../b", "", "a\\0b")]
    [True, True, False, False, False, False, False, False]
    """
    parts = re.split(r"[/\\]", name)
    return bool(name) and name.isprintable() and ":" not in name and all(part not in ("", ".", "..") for part in parts)


def _is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a path stays in a directory after all links, or in the blobs of a repository in the hub's cache."""
    real = Path(os.path.realpath(path))
    if real.is_relative_to(os.path.realpath(folder)):
        return True
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = [Path(HF_HUB_CACHE)]
    # …/models--ORG--NAME/snapshots/COMMIT/FILE, in a cache at any place
    caches += [x.parent for x in folder.absolute().parents if x.name.startswith("models--")]
    for cache in caches:
        real_cache = os.path.realpath(cache)
        if real.is_relative_to(real_cache):
            repository, kind = (*real.relative_to(real_cache).parts, "", "")[:2]
            return repository.startswith("models--") and kind == "blobs"
    return False


def _describe(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def _shorten(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:119]}…"
