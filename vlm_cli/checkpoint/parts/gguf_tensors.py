"""The tensors in a GGUF file, by name, without their numbers.

The reader of the package `gguf` makes an object of each token, which takes half a minute for a large vocabulary. This
one skips what it does not need.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

__all__ = ["count_gguf_elements"]

#: Type of a value -> its bytes, for values of fixed size.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def count_gguf_elements(path: Path) -> dict[str, int]:
    """Return how many numbers each tensor of a GGUF file holds.

    Raises:
        OSError, ValueError, struct.error: if it is no complete GGUF file of version 2 or 3.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        order = "<" if struct.unpack_from("<I", data, 4)[0] < 2**16 else ">"
        return _Header(data, order).read()


class _Header:
    """Reads a header from its beginning to its end."""

    def __init__(self, data: mmap.mmap, order: str) -> None:
        self.data, self.order, self.at = data, order, 8

    def read(self) -> dict[str, int]:
        num_tensors, num_values = self._number("Q"), self._number("Q")
        for _ in range(num_values):
            self._text()
            self._skip(self._number("I"))
        found = {}
        for _ in range(num_tensors):
            name = self._text().decode("utf-8", errors="replace")
            shape = [self._number("Q") for _ in range(self._number("I"))]
            self._number("I"), self._number("Q")  # type and place of the numbers
            found[name] = math.prod(shape)
        return found

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(self.order + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        assert isinstance(value, int)
        return value

    def _text(self) -> bytes:
        length = self._number("Q")
        self.at += length
        return self.data[self.at - length : self.at]

    def _skip(self, kind: int) -> None:
        """Skip a value."""
        if kind in _SIZES:
            self.at += _SIZES[kind]
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self.at += count * _SIZES[inner]
            else:
                for _ in range(count):
                    self._skip(inner)
        else:
            raise ValueError(f"a value has the unknown type {kind}")
