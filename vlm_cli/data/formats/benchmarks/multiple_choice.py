"""Benchmarks of multiple choice: ScienceQA, MMBench, MMMU, MMStar.

The prompt is the hint as `Context: …`, the question, the choices with their letters, and then LETTER.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from vlm_cli.data.formats.benchmarks.benchmark import (
    LETTER,
    SHORT,
    Benchmark,
    Question,
    find_choices,
    pictures_of,
    question_of,
    text_of,
    texts_of,
    write_choices,
)
from vlm_cli.data.formats.pictures import read_media
from vlm_cli.data.jsonl import RecordError, get_field
from vlm_cli.prompt import Medium, Text

__all__ = ["MMMU", "MMBench", "MMStar", "ScienceQA"]


def _write(question: str, choices: Sequence[str], hint: str = "") -> str:
    context = f"Context: {hint.strip()}\n" if hint.strip() and hint.strip().lower() != "nan" else ""
    return f"{context}{question}{write_choices(choices)}{LETTER}"


class ScienceQA(Benchmark):
    """ScienceQA: lessons of schools, of which about half show a picture, `SPLIT/ID/image.png`."""

    name = "ScienceQA"
    keys = '"question" with "choices", and "answer" as a number from 0'
    metric = "multiple-choice"
    site = "https://github.com/lupantech/ScienceQA"

    def matches(self, data: dict[str, Any]) -> bool:
        of_lessons = not {"lecture", "solution", "skill"}.isdisjoint(data)
        return of_lessons and {"question", "choices", "answer"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        choices = texts_of(data, "choices")
        answer = get_field(data, "answer", int, "a number")
        if not 0 <= answer < len(choices):
            raise RecordError(f'"answer" is {answer}, and there are {len(choices)} choices, from 0.')
        text = _write(question_of(data), choices, text_of(data, "hint"))
        return Question(
            (*read_media(data.get("image"), "image", "image"), Text(text)),
            ascii_uppercase[answer],
            choices=choices,
            id=text_of(data, "id") or None,
            kind=text_of(data, "subject") or None,
        )


_ROTATION = 1_000_000


class MMBench(Benchmark):
    """MMBench, and other tables with a column for each choice: A, B, C, …"""

    name = "MMBench"
    keys = '"question" with "A", "B" and "image"'
    metric = "multiple-choice"
    site = "https://github.com/open-compass/MMBench"

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "A", "B", "image"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        choices = find_choices(data)
        if list(choices) != list(ascii_uppercase[: len(choices)]) or len(choices) < 2:
            given = ", ".join(choices) or "none"
            raise RecordError(f"has the choices {given}, and they must be two or more: A, B, C and so on.")
        question = question_of(data).replace("<image 1>", "").strip()  # MMStar's table says so where its picture stands
        text = _write(question, list(choices.values()), text_of(data, "hint"))
        return Question(
            (*pictures_of(data), Text(text)),
            text_of(data, "answer"),
            choices=tuple(choices.values()),
            id=text_of(data, "index") or None,
            kind=text_of(data, "category") or None,
            group=_rotated(text_of(data, "index")),
        )


def _rotated(index: str) -> str:
    """Return the number of a question of MMBench: the indices of its rotations are 1,000,000 apart."""
    return str(int(index) % _ROTATION) if index.isdecimal() else ""


class MMStar(Benchmark):
    """MMStar: questions that a model cannot answer without the picture. The question holds its choices.

    They stand behind `Options:` as `A: text, B: text, …`, or behind `Choices:` as `(A) text` on lines of their own.
    """

    name = "MMStar"
    keys = '"question" that ends with its options, with "l2_category" and "image"'
    metric = "multiple-choice"
    site = "https://huggingface.co/datasets/Lin-Chen/MMStar"

    _OPTIONS = re.compile(r"\b(?:Options|Choices):")
    _OPTION = re.compile(r"(?:^|[,\n])\s*\(?([A-Z])[:.)]\s*")

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "answer", "l2_category", "image"} <= data.keys() and "A" not in data

    def ask(self, data: dict[str, Any]) -> Question:
        question = question_of(data)
        begins = [x.span() for x in self._OPTIONS.finditer(question)] or [(0, 0)]
        words, choices = question[: begins[-1][0]].strip(), self._split(question[begins[-1][1] :].strip())
        if not words or not choices:
            raise RecordError('"question" must end with its options: Options: A: …, B: …')
        return Question(
            (*pictures_of(data), Text(_write(words, choices))),
            text_of(data, "answer"),
            choices=choices,
            id=text_of(data, "index") or None,
            kind=text_of(data, "category") or None,
        )

    def _split(self, options: str) -> tuple[str, ...]:
        """Return the texts of options, which begin with A, B and so on; none if they do not begin so."""
        found: list[re.Match[str]] = []
        for option in self._OPTION.finditer(options):
            if option[1] == ascii_uppercase[len(found) % len(ascii_uppercase)]:  # or it is a part of a text
                found.append(option)
        if not found or found[0].start():
            return ()
        ends = [*(x.start() for x in found[1:]), len(options)]
        return tuple(options[x.end() : end].strip().rstrip(",").strip() for x, end in zip(found, ends, strict=True))


class MMMU(Benchmark):
    """MMMU: questions of colleges, with up to seven pictures at `<image 1>`, `<image 2>`, …, some without choices.

    A question without choices ends with SHORT. A picture stands where it is named first; one without a name, in front.
    """

    name = "MMMU"
    keys = '"question" with "options", "question_type" and "image_1"'
    metric = "multiple-choice"
    site = "https://huggingface.co/datasets/MMMU/MMMU"

    _TAG = re.compile(r"<image (\d)>")

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "options", "question_type", "image_1"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        choices, question = _read_list(data.get("options"), "options"), question_of(data)
        answers = _read_list(data.get("answer"), "answer")
        identity = text_of(data, "id") or None
        if not answers or answers[0] == "?":
            answers = ("",)
        subject = "_".join(identity.split("_")[1:-1]) if identity else ""
        return Question(
            self._place(data, _write(question, choices) if choices else f"{question}{SHORT}"),
            answers[0],
            answers if len(answers) > 1 else (),
            choices,
            identity,
            subject or None,
        )

    def _place(self, data: dict[str, Any], text: str) -> tuple[Text | Medium, ...]:
        """Put each picture where the text names it first."""
        pictures = {str(i): tuple(read_media(data.get(f"image_{i}"), f"image_{i}", "image")) for i in range(1, 8)}
        left = {number: media for number, media in pictures.items() if media}
        parts: list[Text | Medium] = []
        for i, piece in enumerate(self._TAG.split(text)):
            if i % 2:
                parts += left.pop(piece, ()) or [Text(f"<image {piece}>")]
            elif piece:
                parts.append(Text(piece))
        return (*(medium for media in left.values() for medium in media), *parts)


def _read_list(value: Any, key: str) -> tuple[str, ...]:
    """Return a list of texts, which MMMU writes as Python does, inside of a text."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RecordError(f'"{key}" must be a list, and cannot be read as one.') from None
        value = [str(x) for x in value]
    return texts_of({key: value}, key)
