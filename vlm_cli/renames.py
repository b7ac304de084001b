"""Give a finished file or directory its name, without destroying what another program put there meanwhile.

Linux renames in two ways that os.rename lacks: it can refuse if the new name is taken, and it can exchange two names in
one step. Where the system or the file system has neither, the functions look first and then rename. What appears
between the two steps is lost only if it is a file or an empty folder: os.rename never replaces a folder with files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["move_back", "move_over", "move_to_new_name", "remove_tree"]

_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2, from Linux' include/uapi/linux/fs.h
_WORKING_DIRECTORY = -100  # AT_FDCWD: a relative path starts in the working directory
#: Errors that say: this system or this file system cannot rename in this way.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def move_to_new_name(source: Path, target: Path) -> None:
    """Rename `source` to `target`, a name that must be free.

    Raises:
        FileExistsError: if `target` exists, also as a broken link. Nothing is changed.
        OSError: if the system cannot rename.
    """
    if _rename_with_flag(source, target, _NOREPLACE):
        return
    if not source.is_dir():
        try:
            os.link(source, target, follow_symlinks=False)  # like NOREPLACE, it refuses a name that is taken
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):
            pass  # a file system without hard links
        else:
            os.unlink(source)
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def move_over(source: Path, target: Path) -> None:
    """Rename `source` to `target`, and keep what was at `target` under the name `source`, if the system can.

    Where the system cannot exchange two names, an old directory steps aside for a moment, and an old file is lost.

    Raises:
        OSError: if the system cannot rename. The old `target` stays.
    """
    if not os.path.lexists(target):
        move_to_new_name(source, target)
        return
    if _rename_with_flag(source, target, _EXCHANGE):
        return
    if not source.is_dir():
        os.replace(source, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{source.name}.", suffix=".old", dir=source.parent)) / "old"
    try:
        os.rename(target, aside)
        os.rename(source, target)
        os.rename(aside, source)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    finally:
        with suppress(OSError):
            os.rmdir(aside.parent)


def move_back(source: Path, target: Path) -> None:
    """Undo `move_over(source, target)`.

    Raises:
        OSError: if the system cannot rename.
    """
    if os.path.lexists(source):
        move_over(source, target)
    else:
        os.rename(target, source)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a directory with everything in it, as far as the system permits."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _rename_with_flag(source: Path, target: Path, flag: int) -> bool:
    """Rename by Linux' renameat2; False if the system or the file system lacks it.

    Raises:
        OSError: if the system refuses, for instance because the name is taken.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # another system, or a C library without this function
        return False
    paths = (_WORKING_DIRECTORY, os.fsencode(source), _WORKING_DIRECTORY, os.fsencode(target))
    if call(*paths, ctypes.c_uint(flag)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
