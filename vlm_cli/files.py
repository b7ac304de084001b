"""Files and directories that appear whole or not at all.

A writer fills a temporary neighbour of the target, which takes the target's name only after everything is written:

    with replacing_directory(out) as partial:   # .out.k3v8.partial/ beside out/
        write_everything_into(partial)          # an error here removes the partial directory; out/ stays as it was
                                                # here out/ exists, with all of its files
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from vlm_cli.errors import CheckpointError, OutputExistsError

__all__ = [
    "EXPORT_FILE",
    "check_directory",
    "check_file",
    "flush_to_disk",
    "is_vlm_directory",
    "replacing_directory",
    "replacing_file",
]

EXPORT_FILE = "vlm_export.json"  # `vlm export` writes it into directories that other programs read


def is_vlm_directory(path: Path) -> bool:
    """Tell whether a directory holds a VLM, as `vlm build` writes it."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "vlm"
    except (OSError, ValueError, AttributeError):
        return False


def check_directory(out: Path, *, overwrite: bool) -> None:
    """Check that the directory `out` may be written. `overwrite` permits to replace one that vlm wrote.

    Raises:
        OutputExistsError: if `out` exists and may not be replaced.
        CheckpointError: if the folder that is to hold it does not exist.
    """
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputExistsError(f"{str(out)!r} is the working directory or holds it. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {str(out)!r}: the folder {str(out.absolute().parent)!r} does not exist.")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputExistsError(f"{str(out)!r} exists. Choose another name, or add --overwrite to replace it.")
    is_written_by_vlm = is_vlm_directory(out) or (out / EXPORT_FILE).is_file()
    if not out.is_dir() or (any(out.iterdir()) and not is_written_by_vlm):
        raise OutputExistsError(
            f"{str(out)!r} is not a directory that vlm wrote, so --overwrite does not replace it. Choose another name."
        )


def check_file(path: Path, *, overwrite: bool) -> None:
    """Check that the file `path` may be written. `overwrite` permits to replace an existing file.

    Raises:
        OutputExistsError: if `path` exists and may not be replaced.
        CheckpointError: if its folder does not exist, or this user may not write there.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: the folder {str(folder)!r} does not exist.")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"cannot write {str(path)!r}: this user may not write to {str(folder)!r}.")
    if not path.exists():
        return
    if not path.is_file():
        raise OutputExistsError(f"{str(path)!r} is a directory or a device, not a file. Choose another name.")
    if not overwrite:
        raise OutputExistsError(f"{str(path)!r} exists. Choose another name, or add --overwrite to replace it.")


@contextmanager
def replacing_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty directory that takes the name `out` after the block; an error in the block removes it instead.

    Raises:
        OutputExistsError: if `out` may not be written.
        CheckpointError: if the disk is full, or this user may not write to the folder.
    """
    check_directory(out, overwrite=overwrite)
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
    except SafetensorError as error:  # safetensors raises its own error when the disk is full
        raise CheckpointError(f"cannot write the weights: {error}. Nothing was changed.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing_file(path: Path, *, overwrite: bool = False) -> Iterator[TextIO]:
    """Give a text file that takes the name `path` after the block; an error in the block removes it instead.

    Raises:
        OutputExistsError: if `path` may not be written.
        CheckpointError: if the disk is full, or this user may not write to the folder.
    """
    check_file(path, overwrite=overwrite)
    target = path.resolve()  # a symbolic link stays a link: the file it points to is replaced
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".partial", dir=target.parent)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        if partial is not None:
            with suppress(FileNotFoundError):
                os.unlink(partial)


def flush_to_disk(path: Path) -> None:
    """Make the system write a file, or a folder's list of names, from its memory to the disk.

    Systems that cannot open or flush a folder are left alone.

    Raises:
        OSError: if the disk is full or broken.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(handle)


def _swap(new: Path, out: Path) -> None:
    """Rename `new` to `out`. An existing `out` steps aside first, and returns if the renaming fails."""
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
    """Give a folder and its files the user's usual permissions: mkdtemp and safetensors let only the owner read."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    """The permission bits that this process removes from new files; reading them takes two calls."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
