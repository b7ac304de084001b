"""`Benchmark`: the rows of a published benchmark, its prompt and its metric."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar

from vlm_cli.data.formats.format import ANSWERED, Format
from vlm_cli.data.formats.pictures import read_media
from vlm_cli.data.jsonl import RecordError, describe_type, get_field
from vlm_cli.data.record import Content, Marking, Segment
from vlm_cli.data.sources.base import Embedded
from vlm_cli.prompt import Medium, Text

__all__ = [
    "LETTER",
    "SHORT",
    "Benchmark",
    "Question",
    "find_choices",
    "most_common",
    "picture_name",
    "pictures_of",
    "question_of",
    "text_of",
    "texts_of",
    "write_choices",
]

# The prompts of LLaVA-1.5, https://arxiv.org/abs/2310.03744, with which many models were trained and are compared.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """What a row of a benchmark asks.

    Attributes:
        parts: the prompt with its pictures.
        answer: the right one, which a model that trains learns to write.
        answers: every right one; empty for the answer alone.
        choices: among which the prompt lets one choose.
        id: of the question.
        kind: by which scores are grouped.
        group: the questions that count as one.
    """

    parts: tuple[Text | Medium, ...]
    answer: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    id: str | None = None
    kind: str | None = None
    group: str = ""


class Benchmark(Format):
    """Rows in the form in which a benchmark is published.

    Attributes:
        metric: by which it is marked.
        site: where the form is described.
    """

    metric: ClassVar[str]
    site: ClassVar[str]

    @abstractmethod
    def ask(self, data: dict[str, Any]) -> Question:
        """Return what a row asks.

        Raises:
            RecordError: if the row cannot be used.
        """

    def read(self, data: dict[str, Any]) -> Content:
        asked = self.ask(data)
        if not asked.answer.strip():
            raise RecordError(
                f"has no answer, as in the test split of {self.name}, whose answers are not published. "
                "Give a split with answers."
            )
        return self._content(asked, Segment((Text(asked.answer),), True))

    def read_question(self, data: dict[str, Any]) -> Content:
        asked = self.ask(data)
        return self._content(asked, notes=(ANSWERED,) if asked.answer.strip() else ())

    def _content(self, asked: Question, *answers: Segment, notes: tuple[str, ...] = ()) -> Content:
        marking = Marking(asked.answers, asked.choices, self.metric, asked.group)
        segments = (Segment(asked.parts, False), *answers)
        return Content(segments, id=asked.id, kind=asked.kind, notes=notes, is_turns=True, marking=marking)


def text_of(data: dict[str, Any], *keys: str) -> str:
    """Return the text or number under the first of these keys that has one; empty if none has.

    Raises:
        RecordError: if the value is of another type.
    """
    for key in keys:
        value = data.get(key)
        if value is None or value != value:  # NaN, as tables have it for nothing
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise RecordError(f'"{key}" must be text, got {describe_type(value)}.')
        return str(value)
    return ""


def texts_of(data: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the texts of a list, or the one text; none if there is no such key.

    Raises:
        RecordError: if the value is of another type.
    """
    value = data.get(key)
    if value is None or value == []:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        return tuple(value)
    raise RecordError(f'"{key}" must be a list of texts, got {describe_type(value)}.')


def most_common(answers: Sequence[str]) -> str:
    """Return the answer that most people gave; of several, the first."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def pictures_of(data: dict[str, Any], key: str = "image", name: str | None = None) -> tuple[Medium, ...]:
    """Return the pictures that a row holds, or else the file of a name.

    Raises:
        RecordError: if there is none.
    """
    found = tuple(read_media(data.get(key) or None, key, "image"))
    if not found and name:
        found = (Medium(name),)
    if not found:
        raise RecordError(f'shows no picture: "{key}" is empty.')
    return found


def picture_name(data: dict[str, Any], *keys: str) -> str:
    """Return what the questions about one picture share, under the first of these keys that has it; empty if none has.

    It is the name of the picture, or the hash of a file that a table holds, once for each of its questions.
    """
    for key in keys:
        value = data.get(key)
        if isinstance(value, Embedded):
            return hashlib.sha256(value.data).hexdigest()
        if isinstance(value, (str, int, float)) and value == value and str(value).strip():  # NaN is nothing
            return str(value)
    return ""


def find_choices(data: dict[str, Any]) -> dict[str, str]:
    """Return the texts of the columns A, B, C, … by letter; those that are empty have no choice."""
    return {x: text for x in ascii_uppercase if x in data and (text := text_of(data, x)) and text.lower() != "nan"}


def write_choices(choices: Sequence[str]) -> str:
    r"""Write choices with their letters, each on a line.

    >>> write_choices(["cat", "dog"])
    '\nA. cat\nB. dog'

    Raises:
        RecordError: if there are more choices than letters.
    """
    if len(choices) > len(ascii_uppercase):
        raise RecordError(f"has {len(choices)} choices; letters number at most {len(ascii_uppercase)}.")
    return "".join(f"\n{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False))


def question_of(data: dict[str, Any], key: str = "question") -> str:
    """Return the words of the question.

    Raises:
        RecordError: if there are none.
    """
    return str(get_field(data, key, str, "text")).strip()
