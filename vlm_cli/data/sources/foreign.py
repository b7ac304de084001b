"""Say what a file is that holds no rows, by its first bytes, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_cli.errors import DataError

__all__ = ["refuse_foreign"]

_ROWS = "vlm reads rows: JSON lines or a JSON array, Parquet, Arrow, or tar shards."
_MODEL = "To look at a model, give its directory to vlm inspect."
_CODE = "It may hold code, so vlm does not open it."

#: What the first bytes of a file begin with -> what it is and what to do; `{name}` is the name of the file.
_KINDS: tuple[tuple[bytes, str], ...] = (
    (rb".{8}\{\s*\"[^\0]*\"dtype\"", f"holds the weights of a model (safetensors). {_ROWS} {_MODEL}"),
    (rb"GGUF", f"holds the weights of a language model (GGUF). {_ROWS} {_MODEL}"),
    (rb"PK\x03\x04.{26}[^/]{1,200}/(data\.pkl|\.format_version)", f"holds tensors of PyTorch. {_CODE} {_ROWS}"),
    (rb"\x80[\x02-\x05]", f"is a pickle of Python. {_CODE} {_ROWS}"),
    (rb"\x93NUMPY", f"is an array of NumPy. {_ROWS}"),
    (rb"\x89HDF\r\n", f"is HDF5, which vlm does not read. {_ROWS}"),
    (rb"SQLite format 3\0", f"is a data base of SQLite, which vlm does not read. {_ROWS}"),
    (rb"%PDF-", f"is a PDF. {_ROWS}"),
    (
        rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM.{12}\x28\0\0\0|II\*\0|MM\0\*",
        'is a picture, and not rows. A row names it: {{"prompt": "<image:{name}>…", "completion": "…"}}',
    ),
    (
        rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ",
        'is a clip, and not rows. A row names it: {{"prompt": "<video:{name}>…", "completion": "…"}}',
    ),
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "is a pointer of Git LFS, which stands in the place of the file. Fetch the file: git lfs pull",
    ),
    (rb"\s*<(!doctype html|html)", "is a page of the web (HTML), and not the file itself. Download the file again."),
    (rb"FEA1", "is Feather 1, which vlm does not read. Save it as Parquet, or as Feather 2."),
    *(
        (magic, f"is compressed. Unpack it first: {tool} {{name}}")
        for magic, tool in (
            (rb"\x1f\x8b", "gunzip"),
            (rb"\x28\xb5\x2f\xfd", "unzstd"),
            (rb"BZh", "bunzip2"),
            (rb"\xfd7zXZ", "unxz"),
            (rb"PK\x03\x04", "unzip"),
        )
    ),
)
_CSV = (
    'is a table of text, which vlm does not read. Save it as Parquet: python -c "import datasets; '
    "datasets.load_dataset('csv', data_files='{name}')['train'].to_parquet('data.parquet')\""
)


def refuse_foreign(path: Path, head: bytes) -> None:
    """Refuse a file that cannot hold JSON.

    Args:
        path: the file.
        head: its first bytes; those of Parquet, Arrow and tar are known already.

    Raises:
        DataError: naming what the file is.
    """
    words = next((words for magic, words in _KINDS if re.match(magic, head, re.DOTALL | re.IGNORECASE)), None)
    starts_as_json = head.lstrip()[:1] in (b"{", b"[", b"")
    if words is None and path.suffix.lower() in (".csv", ".tsv") and not starts_as_json:
        words = _CSV
    is_wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16, of which each row tells
    if words is None and b"\0" in head and not starts_as_json and not is_wide:
        words = f"is a binary file of a kind that vlm does not know. {_ROWS}"
    if words is not None:
        raise DataError(f"{str(path)!r} {words.format(name=path.name)}")
