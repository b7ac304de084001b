"""Tar shards as WebDataset writes them: neighbouring members whose names differ only behind the first dot are a sample.

    0001.jpg  0001.json  0002.jpg  0002.json  …

Nothing is unpacked: a picture is a place in its shard. The keys of a `.json` are those of the row. Pictures and clips
stand under "images" and "videos", in the order of the members; where the `.json` lists their names there, its order
holds. A `.txt` beside a picture is the caption that the model learns, unless the `.json` has something to learn.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from vlm_cli.data.jsonl import RecordError, parse_object
from vlm_cli.data.sources.base import Embedded, Row, absent
from vlm_cli.data.sources.files import FileSource, name_shard, reading_shard
from vlm_cli.errors import DataError
from vlm_cli.media import MAX_BYTES
from vlm_cli.plain_data import JSON_BYTES
from vlm_cli.prompt import escape
from vlm_cli.text import decode_text

__all__ = ["TarShards"]

_PICTURES = frozenset(
    ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "heic", "jxl")
)
_CLIPS = frozenset(["mp4", "m4v", "mov", "webm", "mkv", "avi"])
_TEXTS = frozenset(["txt", "text", "caption", "cls"])
_LEARNED = ("prompt", "text", "completion", "turns", "messages", "conversations", "texts")
_MOST_MEMBERS = 4_096  # of one sample


class TarShards(FileSource):
    """Tar files of samples."""

    kind = "tar shards"

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        name = self.shards[shard]
        first, begin = known or (1, 0)
        with self._reading(shard), self.files.path(shard).open("rb") as file:
            file.seek(begin)
            for number, (key, members) in enumerate(_samples(file), start=first):
                if number <= start:
                    continue
                place = members[0][1].offset  # of its header, or of the first of several
                try:
                    data = _read_sample(file, name, number, key, members)
                    yield Row(name, number, data, unit="sample", begin=place)
                except RecordError as error:
                    yield Row(name, number, problem=f"{key!r}: {error}", unit="sample", begin=place)

    def bytes_of(self, reference: str) -> bytes:
        name, _, where = Embedded.parse(reference)
        place = re.fullmatch(r"(\d{1,15})\+(\d{1,15})", where[-1])
        if name not in self.shards or place is None:
            raise absent(self, reference)
        shard, offset, size = self.shards.index(name), int(place[1]), int(place[2])
        if size > MAX_BYTES:
            raise absent(self, reference)
        with self._reading(shard), self.files.path(shard).open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise DataError(f"{name_shard(self, shard)} is shorter than it was. Get it again.")
        return data

    @contextmanager
    def _reading(self, shard: int) -> Iterator[None]:
        try:
            with reading_shard(self, shard):
                yield
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise DataError(f"{name_shard(self, shard)} is damaged or cut short: {error}. Get it again.") from None


def _samples(file: BinaryIO) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Yield the key of each sample, and its members with what stands behind the first dot of their names."""
    current: str | None = None
    members: list[tuple[str, tarfile.TarInfo]] = []
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # the list would grow with the shard
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if member.isfile() and stem and not base.startswith("."):
                key = f"{folder}{slash}{stem}"
                if current is not None and (key != current or len(members) >= _MOST_MEMBERS):
                    yield current, members
                    members = []
                current = key
                members.append((ending.lower(), member))
        if current is not None:
            yield current, members
        # tarfile takes a header that it cannot read, and the end of the file, for the end of the archive.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of the archive is found")


def _read_sample(
    file: BinaryIO, shard: str, number: int, key: str, members: list[tuple[str, tarfile.TarInfo]]
) -> dict[str, Any]:
    """Return the values of a sample.

    Raises:
        RecordError: if a member cannot be read.
    """
    data: dict[str, Any] = {}
    texts: dict[str, str] = {}
    found: dict[str, dict[str, Embedded]] = {"images": {}, "videos": {}}  # by the name of the member
    seen = set[str]()
    for ending, member in members:
        if ending in seen:
            raise RecordError(f"it has two members .{ending}.")
        seen.add(ending)
        last = ending.rpartition(".")[2]
        if last == "json":
            data |= parse_object(_read(file, member, JSON_BYTES))
        elif last in _TEXTS:
            texts[ending] = _decode(_read(file, member, JSON_BYTES), ending)
        elif last in _PICTURES or last in _CLIPS:
            where = f"{member.offset_data}+{member.size}"
            reference = Embedded.refer(shard, number, ending, where)
            content = _read(file, member, MAX_BYTES)
            found["images" if last in _PICTURES else "videos"][member.name] = Embedded(reference, content)
    _show_files(data, found)
    data |= {name: text for name, text in texts.items() if name not in data}
    caption = next((texts[name] for name in ("txt", "text", "caption") if name in texts), None)
    if caption is not None and not any(name in data for name in _LEARNED if name not in texts):
        data.pop("text", None)
        data |= {"prompt": "", "completion": escape(caption)}
    data.setdefault("__key__", key)  # no id: shards may repeat it
    return data


def _show_files(data: dict[str, Any], found: dict[str, dict[str, Embedded]]) -> None:
    """Put the pictures and clips of a sample where records have them."""
    for name, files in found.items():
        listed = data.get(name)
        if files and not listed:
            data[name] = list(files.values())
        elif isinstance(listed, list):
            by_name = dict(files)
            for member, embedded in files.items():
                base = member.rpartition("/")[2]
                by_name |= {base: embedded, base.partition(".")[2]: embedded}
            data[name] = [by_name.get(x, x) if isinstance(x, str) else x for x in listed]


def _read(file: BinaryIO, member: tarfile.TarInfo, most: int) -> bytes:
    if member.issparse() or member.size > most:
        what = "is stored with holes" if member.issparse() else f"has {member.size:,} bytes; vlm reads at most {most:,}"
        raise RecordError(f"its member {member.name!r} {what}.")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise EOFError(f"the member {member.name!r} ends too early")
    return data


def _decode(raw: bytes, ending: str) -> str:
    try:
        return decode_text(raw)
    except ValueError as error:
        raise RecordError(f"its .{ending} is {error}.") from None
