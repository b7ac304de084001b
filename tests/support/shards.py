"""The same records in every kind of shard that vlm reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["draw", "rows_of", "write_tar"]


def draw(shade: int, format: str = "PNG") -> bytes:
    """A small picture, as a file."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 40)).save(file, format)
    return file.getvalue()


def rows_of(count: int) -> list[dict[str, Any]]:
    """Records with a picture each, as bytes."""
    return [
        {"prompt": f"Which shade is {i}?", "completion": f" {i}", "images": [draw(i)], "id": f"r{i}"}
        for i in range(count)
    ]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, row: dict[str, Any]) -> list[tuple[str, bytes]]:
    """The members of one sample of a tar shard."""
    data = {name: x for name, x in row.items() if name != "images"}
    return [(f"{key}.json", json.dumps(data).encode()), *((f"{key}.png", x) for x in row["images"])]
