"""Rows in the columns of Apache Arrow: Arrow files and streams, Feather, Parquet, and what `datasets` saves.

Columns of pictures are bytes, paths, or the structs of both that `datasets` writes.
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm_cli.data.sources.base import Embedded, Row, absent
from vlm_cli.data.sources.files import FileSource, Shards, name_shard, reading_shard
from vlm_cli.errors import DataError, UsageError

__all__ = ["ArrowFiles", "ArrowStreams", "ParquetFiles", "TableSource"]

_GROUP_BYTES = 4 << 30  # of a row group of Parquet, when it is unpacked
_ROWS_AT_ONCE = 16  # that become Python objects
_KEPT_BYTES = 256 << 20  # of row groups that stay in memory for the next picture

_Status = tuple[int, int]


class TableSource(FileSource):
    """Files whose rows are cut into batches of columns."""

    def __init__(self, name: str, files: Shards) -> None:
        require_pyarrow(self.kind, name)
        super().__init__(name, files)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: dict[int, tuple[_Status, Any]] = {}  # shard -> what is open
        self._kept: dict[tuple[Any, ...], Any] = {}  # batches and row groups of these files

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in vars(self).items() if key not in ("_open", "_kept", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        name, number = self.shards[shard], 0
        with self._reading(shard):
            file = self._opened(shard)
            for batch, first in self._batches(file, start):
                for offset in range(max(0, start - first), batch.num_rows, _ROWS_AT_ONCE):
                    for i, values in enumerate(batch.slice(offset, _ROWS_AT_ONCE).to_pylist()):
                        number = first + offset + i + 1
                        data = {key: _plain(x, name, number, key) for key, x in values.items()}
                        yield Row(name, number, data)

    def bytes_of(self, reference: str) -> bytes:
        name, number, (column, *where) = Embedded.parse(reference)
        if name not in self.shards:
            raise absent(self, reference)
        shard = self.shards.index(name)
        with self._reading(shard):
            value = self._value(self._opened(shard), shard, number - 1, column)
        value = None if value is None else value.as_py()
        for key in where:
            value = value[int(key)] if isinstance(value, list) and key.isdecimal() and int(key) < len(value) else None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise absent(self, reference)
        return data

    @contextmanager
    def _reading(self, shard: int) -> Iterator[None]:
        """Turn an error of Arrow into one that names the shard."""
        import pyarrow

        try:
            with reading_shard(self, shard):
                try:
                    yield
                except OSError as error:
                    if error.errno is not None:
                        raise
                    raise pyarrow.ArrowException(str(error)) from None  # Arrow's own, of a file that ends too early
        except (pyarrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
            words = str(error).splitlines()[0][:200] if str(error) else "no memory is left"
            raise DataError(
                f"{name_shard(self, shard)} is damaged or cut short: {words.rstrip('.')}. Get it again."
            ) from None

    def _opened(self, shard: int) -> Any:
        """Open a shard; in another process than before, open it anew.

        Raises:
            DataError: if the file is another one than when it was opened first.
        """
        if self._process != os.getpid():
            self._forget()
        path = self.files.path(shard)
        status = os.stat(path)
        identity = status.st_size, status.st_mtime_ns
        if shard not in self._open:
            if len(self._open) >= 64:  # a process may open about a thousand files
                self._forget()
            self._open[shard] = identity, self._open_file(str(path))
        before, file = self._open[shard]
        if before != identity:
            raise DataError(f"{name_shard(self, shard)} has changed since it was opened.")
        return file

    def _keep(self, key: tuple[Any, ...], value: Any) -> Any:
        """Keep a value until others need its place."""
        self._kept[key] = value
        while len(self._kept) > 1 and sum(x.nbytes for x in self._kept.values()) > _KEPT_BYTES:
            self._kept.pop(next(iter(self._kept)))
        return value

    @abstractmethod
    def _open_file(self, path: str) -> Any:
        """Open a file."""

    @abstractmethod
    def _batches(self, file: Any, start: int) -> Iterator[tuple[Any, int]]:
        """Yield batches and the number of rows before each; those that end before row `start` may be left out."""

    @abstractmethod
    def _value(self, file: Any, shard: int, row: int, column: str) -> Any:
        """Return one value as Arrow has it, by the index of its row; None if there is none."""


class ParquetFiles(TableSource):
    """Parquet files. A picture in random order costs the row group that holds it."""

    kind = "Parquet"

    def _open_file(self, path: str) -> Any:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=1 << 20)

    def _batches(self, file: Any, start: int) -> Iterator[tuple[Any, int]]:
        first = 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            if first + metadata.num_rows > start:
                self._check_size(metadata.total_byte_size)
                before = first
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                    yield batch, before
                    before += batch.num_rows
            first += metadata.num_rows

    def _value(self, file: Any, shard: int, row: int, column: str) -> Any:
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            if row < metadata.num_rows:
                break
            row -= metadata.num_rows
        else:
            return None
        key = shard, group, column
        if key not in self._kept:
            self._check_size(metadata.total_byte_size)
            self._keep(key, file.read_row_group(group, columns=[column], use_threads=False))
        table = self._kept[key]
        return table.column(column)[row] if column in table.column_names else None

    def _check_size(self, size: int) -> None:
        if size > _GROUP_BYTES:
            raise DataError(
                f"a row group of {self.quoted} has {size:,} bytes when it is unpacked; vlm reads at most "
                f"{_GROUP_BYTES:,}. Write it again with fewer rows in a group."
            )


class ArrowFiles(TableSource):
    """Arrow files (IPC, Feather), which the system maps into memory."""

    kind = "Arrow"

    def _open_file(self, path: str) -> Any:
        import pyarrow

        return pyarrow.ipc.open_file(pyarrow.memory_map(path))

    def _batches(self, file: Any, start: int) -> Iterator[tuple[Any, int]]:
        first = 0
        for i in range(file.num_record_batches):
            batch = file.get_batch(i)
            yield batch, first
            first += batch.num_rows

    def _value(self, file: Any, shard: int, row: int, column: str) -> Any:
        firsts = self._firsts(file, shard)
        i = int(firsts.searchsorted(row, side="right")) - 1
        if row >= firsts[-1] or column not in file.schema.names:
            return None
        return file.get_batch(i).column(file.schema.names.index(column))[row - int(firsts[i])]

    def _firsts(self, file: Any, shard: int) -> Any:
        """int[batches + 1]: the index of the first row of each batch."""
        import numpy as np

        if (shard,) not in self._kept:
            rows = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
            self._keep((shard,), np.cumsum([0, *rows]))
        return self._kept[shard,]


class ArrowStreams(TableSource):
    """Arrow streams, as `datasets` saves them."""

    kind = "Arrow"

    def _open_file(self, path: str) -> Any:
        import pyarrow

        return pyarrow.memory_map(path)

    def _batches(self, file: Any, start: int) -> Iterator[tuple[Any, int]]:
        import pyarrow

        first = 0
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file)
        place = file.tell()
        while True:
            file.seek(place)  # another reader of the same file may have moved
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                self._check_end(file)
                return
            place = file.tell()
            yield batch, first
            first += batch.num_rows

    def _check_end(self, file: Any) -> None:
        """Check that the stream has ended, and not the file: Arrow does not tell one from the other."""
        import pyarrow

        file.seek(max(0, file.tell() - 8))
        if file.read(8)[4:] != bytes(4):
            raise pyarrow.ArrowException("no end of the stream is found")

    def _value(self, file: Any, shard: int, row: int, column: str) -> Any:
        """Find a row from the first batch on: without compression, no batch is copied or read."""
        for batch, first in self._batches(file, row):
            if row < first + batch.num_rows:
                names = batch.schema.names
                return batch.column(names.index(column))[row - first] if column in names else None
        return None


def require_pyarrow(kind: str, name: str) -> None:
    """Check that pyarrow is installed.

    Raises:
        UsageError: saying how to install it.
    """
    from importlib.util import find_spec

    if find_spec("pyarrow") is None:
        raise UsageError(
            f"{name!r} is {kind}, which pyarrow reads, and it is not installed: pip install 'vlm-cli[data]'"
        )


def _plain(value: Any, shard: str, number: int, *where: str | int) -> Any:
    """Return a value as JSON has it, with `Embedded` for bytes and for the pictures of `datasets`.

    A number that JSON lacks, such as NaN, is null: so tables write that a value is missing.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Embedded(Embedded.refer(shard, number, *where), bytes(value))
    if isinstance(value, dict):
        if "bytes" in value and value.keys() <= {"bytes", "path"}:
            if value["bytes"] is None:
                return value.get("path")
            return Embedded(Embedded.refer(shard, number, *where), bytes(value["bytes"]))
        return {str(key): _plain(x, shard, number, *where, key) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x, shard, number, *where, i) for i, x in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
