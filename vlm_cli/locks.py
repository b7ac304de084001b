"""Let only one process write an output at a time.

A command locks `.OUT.lock` beside its output OUT before it begins, and removes this file at the end:

    with locked(out):      # another vlm that writes `out` gets an error
        …

The system releases the lock when the process ends, however it ends. After a kill the file stays; the next command that
writes OUT locks it again, and removes it. NFS and most network file systems pass the locks between machines. On a file
system without locks, two commands can start; the first one that ends puts its output in place, and the other one is
refused there (`vlm_cli.renames`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vlm_cli.errors import CheckpointError, OutputExistsError
from vlm_cli.interrupt import removed_at_end

__all__ = ["hidden_name", "locked", "open_locked"]

_MAGIC = b"vlm lock of process "
_LONGEST = 200  # bytes of a name that may get a prefix and a suffix; file systems allow 255

#: The outputs that this process has locked -> process, thread, whether the file system has locks.
_held: dict[Path, tuple[int, int, bool]] = {}
_guard = threading.Lock()


def hidden_name(out: Path) -> str:
    """Return the beginning of the names of hidden files beside an output: a dot and its name, or a hash if it is long.

    >>> hidden_name(Path("models/my-flamingo"))
    '.my-flamingo'
    """
    name = out.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}"


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Lock an output. The same thread may lock it again inside the block.

    Yields:
        Whether the lock keeps other processes away; False on a file system without locks.

    Raises:
        OutputExistsError: if another process or thread writes the output.
        CheckpointError: if the lock cannot be made beside the output.
    """
    name = _absolute(out)
    owner = (os.getpid(), threading.get_ident())
    with _guard:
        held = _held.get(name)
        if held is None or held[0] != os.getpid():  # a forked process inherits the table, but not the locks
            _held[name] = (*owner, False)
            held = None
    if held is not None:
        if held[:2] != owner:
            raise _taken(str(out), "another thread of this process")
        yield held[2]
        return
    try:
        with _lock_file(name, str(out)) as is_exclusive:
            _held[name] = (*owner, is_exclusive)
            yield is_exclusive
    finally:
        _held.pop(name, None)


@contextmanager
def _lock_file(out: Path, shown: str) -> Iterator[bool]:
    """Lock the file `.OUT.lock`, and remove it at the end."""
    path = out.with_name(f"{hidden_name(out)}.lock")
    process = os.getpid()

    def make() -> tuple[BinaryIO, bool]:
        try:
            return _open_locked(path, getattr(os, "O_NOFOLLOW", 0))
        except BlockingIOError:
            raise _taken(shown, _read_owner(path)) from None
        except OSError as error:
            raise CheckpointError(f"cannot write {path.name!r} beside {shown!r}: {error.strerror}.") from None

    def remove(made: tuple[BinaryIO, bool]) -> None:
        if os.getpid() == process:
            # The name goes first: whoever opened the file before must see that it is no longer the one with the name.
            with suppress(OSError):
                if _has_name(made[0], path):
                    path.unlink()
        made[0].close()

    with removed_at_end(make, remove) as (file, is_exclusive):
        _sign(file, path)
        yield is_exclusive


def _sign(file: BinaryIO, path: Path) -> None:
    """Write into a lock which process holds it.

    Raises:
        OutputExistsError: if the file holds something else; it stays as it is.
    """
    file.seek(0)
    found = file.read(len(_MAGIC))
    if found != _MAGIC[: len(found)]:
        file.close()  # so that it is not removed
        raise OutputExistsError(
            f"{str(path)!r} is not a lock that vlm wrote. Move it to another place, or choose another output."
        )
    with suppress(OSError):  # on a full disk the lock holds, too
        file.truncate(0)
        file.write(_MAGIC + f"{os.getpid()} on {platform.node()}\n".encode(errors="replace"))
        file.flush()


def open_locked(path: Path) -> BinaryIO:
    """Open a file for reading and appending, and lock it until it is closed, where the file system can.

    Raises:
        BlockingIOError: if another process has the lock.
        OSError: if the file cannot be opened.
    """
    return _open_locked(path)[0]


def _open_locked(path: Path, flags: int = 0) -> tuple[BinaryIO, bool]:
    """Open and lock a file, and tell whether the lock keeps other processes away.

    Args:
        path: the file; it is made if it does not exist.
        flags: more flags of os.open.
    """
    while True:
        file = os.fdopen(_open_regular(path, flags), "a+b")
        try:
            is_exclusive = _lock(file)
            # Another process may have removed the file after we opened it. Then a third one can lock a new file.
            if _has_name(file, path):
                return file, is_exclusive
        except BaseException:
            file.close()
            raise
        file.close()


def _open_regular(path: Path, flags: int) -> int:
    """Open a file for reading and appending, and return its descriptor; a named pipe or a device is an error."""
    flags |= os.O_RDWR | os.O_APPEND | os.O_CREAT
    # O_NONBLOCK: do not wait for the other end of a named pipe. O_BINARY exists, and matters, on Windows alone.
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a file")
    return handle


def _lock(file: BinaryIO) -> bool:
    """Lock an open file; False on a system or a file system without locks.

    Raises:
        BlockingIOError: if another process has the lock.
    """
    if os.name != "posix":
        return False
    import fcntl

    try:
        # Not `flock`: the workers of a killed process would keep its lock for some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(error.errno, error.strerror) from None
    except OSError:
        return False
    return True


def _has_name(file: BinaryIO, path: Path) -> bool:
    """Tell whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (FileNotFoundError, ValueError):  # ValueError: the file is closed
        return False


def _read_owner(path: Path) -> str:
    """Read from a lock which process holds it.

    A process that closes any of its handles of a file loses its locks on it. So only a process without the lock reads.
    """
    with suppress(OSError):
        text = path.read_bytes()[:300]
        if text.startswith(_MAGIC):
            return f"another vlm, process {text[len(_MAGIC) :].decode(errors='replace').strip()}"
    return "another vlm"


def _taken(name: str, owner: str) -> OutputExistsError:
    return OutputExistsError(f"{name!r} is being written by {owner}. Wait for it, or choose another name.")


def _absolute(out: Path) -> Path:
    """Return the output's path, the same for each spelling. The last name may be a link, which stays one."""
    return out.absolute().parent.resolve() / out.name
