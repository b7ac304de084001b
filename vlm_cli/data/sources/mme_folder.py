"""The directory of MME: a folder for each task, and a text file of two questions for each picture.

    color/0001.jpg   color/0001.txt            and   artwork/images/0001.jpg   artwork/questions_answers_YN/0001.txt

A line is a question, a tab, and Yes or No.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.sources.base import Row
from vlm_cli.data.sources.files import FileSource, Shards, reading_shard
from vlm_cli.text import decode_text

__all__ = ["MMEFolder", "find_mme"]

_ANSWERS = "questions_answers_YN"
_PICTURES = (".jpg", ".png", ".jpeg")
_HEAD = 4096


def find_mme(folder: Path) -> Shards | None:
    """Return the files of questions in a directory; None if it is not MME's."""
    for patterns in ((f"*/{_ANSWERS}/*.txt", "*/*.txt"), (f"{_ANSWERS}/*.txt", "*.txt")):
        found: list[Path] = []
        for pattern in patterns:  # tasks of both forms stand side by side
            files = sorted(path for path in folder.glob(pattern) if path.is_file() and _find_picture(path) is not None)
            if files and _is_question(files[0]):
                found += files
        if found:
            return Shards(sorted(found), folder.absolute())
    return None


def _is_question(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.read(_HEAD).split(b"\n", 1)[0].strip().lower()
    return b"\t" in line and line.endswith((b"\tyes", b"\tno"))


def _find_picture(path: Path) -> Path | None:
    """Return the picture of a file of questions."""
    folder = path.parent.parent / "images" if path.parent.name == _ANSWERS else path.parent
    return next((x for end in _PICTURES if (x := folder / f"{path.stem}{end}").is_file()), None)


class MMEFolder(FileSource):
    """The files of questions of MME's tasks."""

    kind = "MME's directory"

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        name, path = self.shards[shard], self.files.path(shard)
        task = path.parent.parent if path.parent.name == _ANSWERS else path.parent
        picture = _find_picture(path)
        with reading_shard(self, shard):
            raw = path.read_bytes()
        for number, line in enumerate(raw.splitlines(), start=1):
            if number <= start or not line.strip():
                continue
            try:
                question, answer = _split(line)
                if picture is None:
                    raise RecordError(f"the picture of {path.name!r} is gone.")
            except RecordError as error:
                yield Row(name, number, problem=str(error), unit="line")
                continue
            image = picture.absolute().relative_to(self.folder)
            data = {"question_id": f"{task.name}/{picture.name}", "image": str(image), "category": task.name}
            yield Row(name, number, {**data, "question": question, "answer": answer}, unit="line")


def _split(line: bytes) -> tuple[str, str]:
    """Return a question and its answer.

    Raises:
        RecordError: if they cannot be told apart.
    """
    try:
        question, tab, answer = decode_text(line).rpartition("\t")
    except ValueError as error:
        raise RecordError(f"{error}.") from None
    if not tab:
        raise RecordError("has no tab between a question and its answer.")
    return question.strip(), answer.strip()
