"""Single files, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from vlm_cli.errors import CheckpointError, OutputExistsError

__all__ = ["check_file", "replacing_file"]


def check_file(path: Path, *, overwrite: bool) -> None:
    """
    Raises:
        OutputExistsError: if `path` may not be written.
        CheckpointError: if its folder is not there or takes no files.
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
def replacing_file(path: Path, *, overwrite: bool = False) -> Iterator[TextIO]:
    """A text file beside `path` that becomes it when the block ends well, and vanishes otherwise.

    Raises:
        OutputExistsError: if `path` may not be written.
        CheckpointError: if the disk is full or the folder cannot be written.
    """
    check_file(path, overwrite=overwrite)
    target = path.resolve()  # a link stays one
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
