"""Files and directories that appear whole or not at all.

A writer fills a temporary neighbour of the target, which takes the target's name only after everything is written:

    with replacing_directory(out) as partial:   # .out.k3v8.partial/ beside out/
        write_everything_into(partial)          # an error here removes the partial directory; out/ stays as it was
                                                # here out/ exists, with all of its files

A command that computes before it writes reserves its output first, so that two commands never compute the same output:

    with reserved_directory(out):               # .out.lock beside out/; another vlm is refused
        …
        with replacing_directory(out) as partial:
            …
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from vlm_cli.errors import CheckpointError, OutputExistsError
from vlm_cli.interrupt import removed_at_end, undivided
from vlm_cli.locks import hidden_name, locked
from vlm_cli.plain_data import read_json
from vlm_cli.renames import move_back, move_over, move_to_new_name, remove_tree

__all__ = [
    "EXPORT_FILE",
    "check_directory",
    "check_file",
    "flush_to_disk",
    "is_vlm_directory",
    "remove_leftovers",
    "replacing_directory",
    "replacing_file",
    "replacing_files",
    "reserved_directory",
    "reserved_files",
]

EXPORT_FILE = "vlm_export.json"  # `vlm export` writes it into directories that other programs read


def is_vlm_directory(path: Path) -> bool:
    """Tell whether a directory holds a VLM, as `vlm build` writes it."""
    try:
        config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "vlm"


def check_directory(out: Path, *, overwrite: bool) -> None:
    """Check that the directory `out` may be written. `overwrite` permits to replace one that vlm wrote.

    Raises:
        OutputExistsError: if `out` exists and may not be replaced.
        CheckpointError: if the folder that is to hold it does not exist.
    """
    if str(out) == "-":
        raise OutputExistsError("- means standard output, which cannot hold a directory. Choose a name.")
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputExistsError(f"{str(out)!r} is the working directory or holds it. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {str(out)!r}: the folder {str(out.absolute().parent)!r} does not exist.")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(f"{str(out)!r} exists. Choose another name, or add --overwrite to replace it.")
    _check_is_replaceable(out, str(out))


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
    if not os.path.exists(path):  # other than Path.exists, it takes a name that is too long for one that does not exist
        return
    if not path.is_file():
        raise OutputExistsError(f"{str(path)!r} is a directory or a device, not a file. Choose another name.")
    if not overwrite:
        raise OutputExistsError(f"{str(path)!r} exists. Choose another name, or add --overwrite to replace it.")


@contextmanager
def reserved_directory(out: Path, *, overwrite: bool = False) -> Iterator[bool]:
    """Check that the directory `out` may be written, and keep other processes from writing it during the block.

    Yields:
        Whether the lock keeps other processes away; False on a file system without locks.

    Raises:
        OutputExistsError: if `out` may not be written, or another process writes it.
        CheckpointError: if the folder that is to hold it does not exist or cannot be written.
    """
    check_directory(out, overwrite=overwrite)
    with locked(out) as is_exclusive:
        if is_exclusive:
            remove_leftovers(out)
        check_directory(out, overwrite=overwrite)  # the process that had the lock may have written it
        yield is_exclusive


@contextmanager
def reserved_files(paths: Iterable[Path], *, overwrite: bool = False) -> Iterator[None]:
    """Check that files may be written, and keep other processes from writing them during the block.

    Raises:
        OutputExistsError: if a file may not be written, or another process writes it.
        CheckpointError: if a folder does not exist or cannot be written.
    """
    paths = sorted(paths)  # two processes that lock the same files in two orders could both fail
    for path in paths:
        check_file(path, overwrite=overwrite)
    with ExitStack() as locks:
        for path in paths:
            target = path.resolve() if path.is_symlink() else path
            if locks.enter_context(locked(target)):
                remove_leftovers(target)
            check_file(path, overwrite=overwrite)
        yield


@contextmanager
def replacing_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty directory that takes the name `out` after the block; an error in the block removes it instead.

    Raises:
        OutputExistsError: if `out` may not be written, another process writes it, or it appeared during the block.
        CheckpointError: if the disk is full, or this user may not write to the folder.
    """
    with reserved_directory(out, overwrite=overwrite), _directory_beside(out) as partial:
        try:
            yield partial
            _open_to_others(partial)
            with undivided():
                _put_directory(partial, out, overwrite)
                remove_tree(partial)  # what was at `out` until now
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"cannot write {str(out)!r}: {reason}. Nothing was changed.") from error
        except SafetensorError as error:  # safetensors raises its own error when the disk is full
            raise CheckpointError(f"cannot write the weights: {error}. Nothing was changed.") from None


@contextmanager
def replacing_file(path: Path, *, overwrite: bool = False) -> Iterator[TextIO]:
    """Give a text file that takes the name `path` after the block; an error in the block removes it instead.

    Raises:
        OutputExistsError: if `path` may not be written, or appeared during the block.
        CheckpointError: if the disk is full, or this user may not write to the folder.
    """
    with replacing_files([path], overwrite=overwrite) as (file,):
        yield file


@contextmanager
def replacing_files(paths: Sequence[Path], *, overwrite: bool = False) -> Iterator[list[TextIO]]:
    """Give text files that take the names `paths` after the block, all of them or none.

    Raises:
        OutputExistsError: if one of `paths` may not be written, or appeared during the block.
        CheckpointError: if the disk is full, or this user may not write to a folder.
    """
    for path in paths:
        check_file(path, overwrite=overwrite)
    with ExitStack() as hidden:
        try:
            partials: list[Path] = []
            with ExitStack() as open_files:
                files: list[TextIO] = []
                for path in paths:
                    file, partial = hidden.enter_context(_file_beside(path.resolve()))
                    partials.append(partial)
                    files.append(open_files.enter_context(file))
                yield files
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
            for partial in partials:
                partial.chmod(0o666 & ~_umask())
            # A symbolic link stays a link: the file it points to is replaced.
            with undivided():
                _put_files(partials, [path.resolve() for path in paths], overwrite)
                for partial in partials:
                    remove_tree(partial)  # what was at `paths` until now
        except OSError as error:
            reason = error.strerror or error
            names = " and ".join(repr(str(path)) for path in paths)
            raise CheckpointError(f"cannot write {names}: {reason}. Nothing was changed.") from error


def remove_leftovers(out: Path) -> None:
    """Remove the hidden neighbours of an output that killed processes left.

    Call it under the lock of the output: then no process that lives has such a neighbour. A process that was killed
    between the renames of `move_over` left the old output in one; it gets its name back.
    """
    left = re.compile(re.escape(hidden_name(out)) + r"\.[a-z0-9_]{8}\.partial(\.[a-z0-9_]{8}\.old)?")
    with suppress(OSError):
        for path in out.absolute().parent.iterdir():
            if left.fullmatch(path.name):
                if os.path.lexists(path / "old") and path.suffix == ".old" and not os.path.lexists(out):
                    move_to_new_name(path / "old", out)
                remove_tree(path)


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


def _beside(out: Path) -> dict[str, Any]:
    """Return the arguments with which tempfile makes a hidden neighbour of an output."""
    return {"prefix": f"{hidden_name(out)}.", "suffix": ".partial", "dir": out.absolute().parent}


def _directory_beside(out: Path) -> AbstractContextManager[Path]:
    """Give a hidden directory beside an output, which the end of the block removes.

    Raises:
        CheckpointError: if the disk is full, or this user may not write to the folder.
    """

    def make() -> Path:
        try:
            return Path(tempfile.mkdtemp(**_beside(out)))
        except OSError as error:
            raise CheckpointError(f"cannot write beside {str(out)!r}: {error.strerror}.") from None

    return removed_at_end(make, remove_tree)


def _file_beside(out: Path) -> AbstractContextManager[tuple[TextIO, Path]]:
    """Give a hidden text file beside an output, open, and its path. The end of the block removes the file."""

    def make() -> tuple[TextIO, Path]:
        handle, name = tempfile.mkstemp(**_beside(out))
        return os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n"), Path(name)

    return removed_at_end(make, lambda made: remove_tree(made[1]))


def _put_directory(partial: Path, out: Path, overwrite: bool) -> None:
    """Give a finished directory the name `out`. What `overwrite` replaces gets the name of `partial`.

    Raises:
        OutputExistsError: if `out` appeared since the beginning and may not be replaced.
    """
    if not overwrite:
        _put_new(partial, out)
        return
    _check_is_replaceable(out, str(out))
    move_over(partial, out)
    try:
        _check_is_replaceable(partial, str(out))  # what was at `out` until now
    except OutputExistsError:
        move_back(partial, out)
        raise


def _check_is_replaceable(folder: Path, shown: str) -> None:
    """Check that --overwrite may replace what is at `folder`: nothing, an empty directory, or one that vlm wrote.

    Args:
        folder: where the directory is.
        shown: what the message calls it.

    Raises:
        OutputExistsError: if it is something else.
    """
    if not os.path.lexists(folder):
        return
    is_written_by_vlm = is_vlm_directory(folder) or (folder / EXPORT_FILE).is_file()
    if not folder.is_dir() or (any(folder.iterdir()) and not is_written_by_vlm):
        raise OutputExistsError(
            f"{shown!r} is not a directory that vlm wrote, so --overwrite does not replace it. Choose another name."
        )


def _put_files(partials: Sequence[Path], targets: Sequence[Path], overwrite: bool) -> None:
    """Give finished files their names, all of them or none.

    Raises:
        OutputExistsError: if a file appeared since the beginning and may not be replaced.
    """
    done: list[tuple[Path, Path]] = []
    try:
        for partial, target in zip(partials, targets, strict=True):
            (move_over if overwrite else _put_new)(partial, target)
            done.append((partial, target))
    except BaseException:
        for partial, target in reversed(done):
            move_back(partial, target)
        raise


def _put_new(partial: Path, out: Path) -> None:
    """Rename a finished file or directory to `out`, a name that must be free.

    Raises:
        OutputExistsError: if the name is taken.
    """
    try:
        move_to_new_name(partial, out)
    except FileExistsError:
        raise OutputExistsError(
            f"{str(out)!r} appeared while vlm was working, and stays as it is. Nothing was written. Move it to another "
            "place and repeat the command, or choose another name."
        ) from None


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
