"""stdin, stdout and stderr as any shell may leave them: closed, full, or a pipe whose reader has gone.

    stdout   carries data. The first write that fails raises an error, and the command ends with exit code 1.
    stderr   carries messages. If nobody can get them, the command goes on without them.
    stdin    brings prompts (`vlm_cli.data.inputs` reads it). A read that fails is an error for the user.

A stream that was closed gets its number back, since the next file that the process opens would take this number, and
receive what libraries print.
"""

from __future__ import annotations

import ctypes
import io
import os
import select
import stat
import sys
from typing import TYPE_CHECKING, TextIO

from vlm_cli.text import PICTURE_HEAD, picture_format

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["OutputError", "find_piped_picture", "flush_streams", "open_streams"]


class OutputError(OSError):
    """Standard output cannot be written, and its reader has not simply closed a pipe."""


class _Sink(io.FileIO):
    """A descriptor to write to, which fails once at most.

    Args:
        handle: the descriptor; it stays open.
        is_data: whether a failure raises an error; later writes are dropped in any case.

    Attributes:
        failure: the error of the write that failed.
    """

    def __init__(self, handle: int, *, is_data: bool) -> None:
        super().__init__(handle, "wb", closefd=False)
        self.is_data = is_data
        self.failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some bytes, and return their number.

        Raises:
            BrokenPipeError: if the reader of a pipe has closed it.
            OutputError: if the system cannot write, for instance to a full disk.
        """
        if self.failure is None:
            try:
                while (written := super().write(data)) is None:  # a full pipe in non-blocking mode
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.failure = error
                if self.is_data:
                    raise error if isinstance(error, BrokenPipeError) else OutputError(*error.args) from None
        return memoryview(data).nbytes


def open_streams() -> None:
    """Give this process stdin, stdout and stderr that behave as this module says. Replaced streams stay as they are."""
    if os.name != "posix":
        return
    # In this order: the system gives the lowest number that is free. Writes to a closed stdout must fail, as they would
    # without its number, so it is opened for reading.
    handles = [
        _null(number, flags) if stream is None else number
        for number, (stream, flags) in enumerate(
            [(sys.__stdin__, os.O_RDONLY), (sys.__stdout__, os.O_RDONLY), (sys.__stderr__, os.O_WRONLY)]
        )
    ]
    if sys.stdout is sys.__stdout__:
        sys.stdout = _open_text(handles[1], sys.stdout, is_data=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _open_text(handles[2], sys.stderr, is_data=False)


def _null(number: int, flags: int) -> int:
    """Open the null device in place of a stream that is closed, and return its descriptor."""
    handle = os.open(os.devnull, flags)
    if handle == number:
        os.set_inheritable(handle, True)
    return handle


def _open_text(handle: int, stream: TextIO | None, *, is_data: bool) -> TextIO:
    """Open a descriptor as text, in the way in which Python opened `stream` on it."""
    like = stream if isinstance(stream, io.TextIOWrapper) else None
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(handle, is_data=is_data)),
        encoding="utf-8" if like is None else like.encoding,
        # A file name may hold bytes that are not text, and a terminal may not have every character.
        errors="backslashreplace",
        newline="\n",
        line_buffering=not is_data or (like is not None and like.line_buffering),
        write_through=like is not None and like.write_through,
    )


def flush_streams() -> None:
    """Write what Python still holds of stdout and stderr.

    Raises:
        OSError: if stdout cannot be written.
    """
    for stream in (sys.stderr, sys.stdout):
        if stream is not None:
            stream.flush()


def find_piped_picture() -> str | None:
    """Name the format of a picture that waits on standard input, without taking a byte of it; None if there is none.

    Only Linux can look into a pipe.
    """
    try:
        handle = sys.stdin.fileno()
        mode = os.fstat(handle).st_mode
        if stat.S_ISREG(mode):
            return picture_format(os.pread(handle, PICTURE_HEAD, os.lseek(handle, 0, os.SEEK_CUR)))
        return picture_format(_peek(handle)) if stat.S_ISFIFO(mode) else None
    except (AttributeError, OSError, ValueError):  # a stream that is closed, or none of the system's
        return None


def _peek(pipe: int) -> bytes:
    """Return the first bytes that wait in a pipe; they stay there."""
    tee = ctypes.CDLL(None, use_errno=True).tee
    there, here = os.pipe()
    try:
        nonblocking = 2
        length = tee(pipe, here, PICTURE_HEAD, nonblocking)
        return os.read(there, length) if length > 0 else b""
    finally:
        os.close(there)
        os.close(here)
