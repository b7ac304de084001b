"""What a model is asked: records with one prompt and one expected answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_cli.data.records import Problem, Record, Records, raise_problems, read_records
from vlm_cli.prompt import Medium, Text

__all__ = ["Item", "check_lengths", "read_items"]


@dataclass(frozen=True)
class Item:
    """A question and its answer."""

    line: int  # of the file, from 1
    id: str
    kind: str | None
    prompt: tuple[Text | Medium, ...]
    expected: str

    @property
    def sources(self) -> list[str]:
        """Where its images come from, in order."""
        return [part.source for part in self.prompt if isinstance(part, Medium)]


def read_items(path: Path, limit: int | None = None) -> tuple[list[Item], Records]:
    """Read and check a file of records; return the first `limit` items, and all records.

    Raises:
        DataError: if the file cannot be read, or listing every line that cannot be used.
    """
    records = read_records(path)
    raise_problems(records, [Problem(r.line, problem) for r in records.good if (problem := _no_item(r))])
    return [_item(record) for record in records.good[:limit]], records


def _no_item(record: Record) -> str | None:
    """Why a record has no single answer that could be compared."""
    if len(record.segments) > 2:
        return f'has {len(record.segments) // 2} turns. Write each as a record: a "prompt" and its "completion".'
    if any(isinstance(part, Medium) for part in record.segments[1].parts):
        return 'is a "text" with images in what would be the answer. Write a "prompt" and its "completion".'
    if _has_half_characters(record):
        return r"holds half a character, \ud800 to \udfff, which is no text."
    return None


def _has_half_characters(record: Record) -> bool:
    """JSON can spell them; neither tokenizers nor files take them."""
    texts = [
        part.text if isinstance(part, Text) else part.source for segment in record.segments for part in segment.parts
    ]
    return any("\ud800" <= x <= "\udfff" for text in (*texts, record.id, record.kind or "") for x in text)


def _item(record: Record) -> Item:
    prompt, answer = (segment.parts for segment in record.segments)
    expected = "".join(part.text for part in answer if isinstance(part, Text))
    return Item(record.line, record.id, record.kind, prompt, expected)


def check_lengths(
    items: Sequence[Item], records: Records, model: Any, processor: Any, max_new_tokens: int
) -> list[int]:
    """Tokens of each prompt, all of which leave room for an answer.

    Raises:
        DataError: listing every line that does not.
    """
    from vlm_cli.modeling.budget import ContextBudget, MediumSize

    budget = ContextBudget.of(model)
    lengths = [len(processor.encode(item.prompt)) for item in items]
    problems: list[Problem] = []
    for item, length in zip(items, lengths, strict=True):
        media = [MediumSize() for _ in item.sources]
        if problem := budget.problem(length, media):
            problems.append(Problem(item.line, problem))
        elif problem := budget.problem(length + max_new_tokens, media):
            problems.append(Problem(item.line, f"with --max-new-tokens {max_new_tokens}, {problem}"))
    raise_problems(records, problems)
    return lengths
