"""A JSON file that is one object: the files of benchmarks, which hold their rows somewhere inside.

    VQAv2          {"questions": […], …}, and beside it {"annotations": […], …} except for test splits
    COCO captions  {"images": […], "annotations": [{"image_id": …, "caption": …}, …], …}
    TextVQA        {"dataset_name": "textvqa", "data": […], …}; DocVQA alike
    GQA, ScienceQA {"201307251": {…}, …}

An object of another form is one row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vlm_cli.data.jsonl import RecordError, describe_type, parse_object
from vlm_cli.data.sources.base import Row
from vlm_cli.data.sources.files import FileSource, name_shard, reading_shard
from vlm_cli.errors import DataError
from vlm_cli.plain_data import read_json

__all__ = ["JsonDocument", "is_document"]

MOST_BYTES = 1 << 30  # of a document, which is in memory as a whole
_FIRST = (
    "annotations|data|data_subtype|data_type|dataset_name|dataset_split|dataset_type|dataset_version|images|info|license|"
    "licenses|questions|task_type"
)
_START = re.compile(rf'(?:\xef\xbb\xbf)?\s*\{{\s*(?:"(?:{_FIRST})"|"\d+"\s*:\s*\{{)'.encode())
_LINE_BYTES = 1 << 20  # of a first line that may be a whole record


def is_document(path: Path, head: bytes) -> bool:
    """Tell whether a JSON file is one object with rows inside, and not a line for each row.

    Args:
        path: of the file.
        head: its first bytes.
    """
    if not _START.match(head):
        return False
    with path.open("rb") as file:
        first = file.readline(_LINE_BYTES)
        if not first.endswith(b"\n") or not file.read(_LINE_BYTES).strip():
            return True
    try:
        parse_object(first)
    except RecordError:
        return True
    return False


class JsonDocument(FileSource):
    """JSON files of one object each."""

    kind = "JSON"

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        name = self.shards[shard]
        for number, data in enumerate(_unfold(self._read(shard, self.files.path(shard)), self, shard), start=1):
            if number <= start:
                continue
            if isinstance(data, dict):
                yield Row(name, number, data, unit="element")
            else:
                problem = f"not a record: expected an object, {{…}}, got {describe_type(data)}."
                yield Row(name, number, problem=problem, unit="element")

    def digest(self) -> str:
        """Hash the files, and those that are read beside them."""
        digest = hashlib.sha256(super().digest().encode())
        others = [path for i in range(len(self.shards)) for path in self._beside(i)]
        for path in others:
            digest.update(path.read_bytes())
        return digest.hexdigest() if others else super().digest()

    def _beside(self, shard: int) -> list[Path]:
        """Return the other half of a file of VQAv2, if there is one."""
        path = self.files.path(shard)
        other = _other_half(path)
        return [other] if other is not None and other.is_file() else []

    def _read(self, shard: int, path: Path) -> dict[str, Any]:
        with reading_shard(self, shard):
            try:
                document = read_json(path, most_bytes=MOST_BYTES)
            except ValueError as error:
                raise DataError(f"{name_shard(self, shard)} cannot be used: {error}.") from None
        if not isinstance(document, dict):
            raise DataError(f"{name_shard(self, shard)} must hold an object, got {describe_type(document)}.")
        return document

    def read_other(self, shard: int, path: Path) -> dict[str, Any]:
        """Read the other half of a file."""
        return self._read(shard, path)


def _unfold(document: dict[str, Any], source: JsonDocument, shard: int) -> Iterator[Any]:
    """Yield the rows of a document."""
    if isinstance(document.get("images"), list) and isinstance(document.get("annotations"), list):
        yield from _captions(document["images"], document["annotations"])
    elif isinstance(document.get("questions"), list) or _has_answers(document):
        yield from _join(document, source, shard)
    elif isinstance(document.get("data"), list):
        yield from document["data"]
    elif document and all(key.isdecimal() and isinstance(x, dict) for key, x in document.items()):
        yield from (_keyed(key, x) for key, x in document.items())
    else:
        yield document


def _keyed(key: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose id is the key under which it stands; ScienceQA's picture lies in a folder of that name."""
    row = {"id": key, **data}
    if isinstance(data.get("image"), str) and "choices" in data:
        row["image"] = f"{data.get('split', '')}/{key}/{data['image']}".lstrip("/")
    return row


def _captions(images: list[Any], annotations: list[Any]) -> Iterator[Any]:
    """Yield the pictures of COCO, each with its captions."""
    captions: dict[str, list[Any]] = {}
    for x in annotations:
        if isinstance(x, dict) and "caption" in x:
            captions.setdefault(repr(x.get("image_id")), []).append(x["caption"])
    for image in images:
        yield {**image, "captions": captions.get(repr(image.get("id")), [])} if isinstance(image, dict) else image


def _has_answers(document: dict[str, Any]) -> bool:
    """Tell whether a document holds the answers of VQAv2."""
    found = document.get("annotations")
    return isinstance(found, list) and bool(found) and isinstance(found[0], dict) and "question_id" in found[0]


def _other_half(path: Path) -> Path | None:
    """Return the file of the answers to some questions, or of the questions to some answers, by VQA's names.

    >>> str(_other_half(Path("v2_OpenEnded_mscoco_val2014_questions.json")))
    'v2_mscoco_val2014_annotations.json'
    >>> str(_other_half(Path("v2_mscoco_val2014_annotations.json")))
    'v2_OpenEnded_mscoco_val2014_questions.json'
    """
    name = path.name
    if name.endswith("questions.json"):
        return path.with_name(name.replace("OpenEnded_", "").replace("questions.json", "annotations.json"))
    if name.endswith("annotations.json"):
        start = "OpenEnded_" if "mscoco_" in name or "abstract_" in name else ""
        renamed = re.sub(r"(mscoco_|abstract_)", rf"{start}\1", name, count=1)
        return path.with_name(renamed.replace("annotations.json", "questions.json"))
    return None


def _join(document: dict[str, Any], source: JsonDocument, shard: int) -> Iterator[dict[str, Any]]:
    """Yield the questions of VQAv2 with their answers, and with the names of COCO's pictures.

    Raises:
        DataError: if the other file is not there, or is of other questions.
    """
    path = source.files.path(shard)
    other, wanted = _other_half(path), "annotations" if "questions" in document else "questions"
    kind = str(document.get("data_subtype", ""))
    if wanted not in document:
        if other is None or not other.is_file():
            if wanted == "annotations" and kind.startswith("test"):
                yield from map(partial(_unanswered, kind=kind), document["questions"])
                return
            name = repr(other.name) if other is not None else f"the file of {wanted} of the same split"
            why = ", and the answers of test splits are not published" if wanted == "annotations" else ""
            raise DataError(
                f"{name_shard(source, shard)} holds {'questions' if why else 'answers'} alone{why}. "
                f"Put {name} beside it, both with their published names."
            )
        document = {**source.read_other(shard, other), **document}
    questions, answers = document.get("questions"), document.get("annotations")
    if not isinstance(questions, list) or not isinstance(answers, list):
        raise DataError(f"{str(other)!r} must hold a list of {wanted}, for {name_shard(source, shard)}.")
    by_id = {repr(x.get("question_id")): x for x in answers if isinstance(x, dict)}  # a damaged id may be a list
    for question in questions:
        if not isinstance(question, dict) or repr(question.get("question_id")) not in by_id:
            identity = question.get("question_id") if isinstance(question, dict) else question
            raise DataError(
                f"{name_shard(source, shard)} has the question {identity!r}, and its answers are not in "
                f"{str(other.name if other else '')!r}. Give the two files of one split."
            )
        yield _with_picture({**by_id[repr(question.get("question_id"))], **question}, kind)


def _unanswered(question: Any, kind: str) -> Any:
    """Return a question of a test split of VQAv2, whose answers nobody but its server knows."""
    if not isinstance(question, dict):
        return question
    return _with_picture({"question_type": "", "answer_type": "", "answers": [], **question}, kind)


def _with_picture(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """Name COCO's picture of a question; test-dev has those of the whole test split."""
    if isinstance(row.get("image_id"), int):
        split = kind.replace("test-dev", "test")
        row["file_name"] = f"COCO_{split}_{row['image_id']:012d}.jpg"
    return row
