"""Items: questions with known answers. A record is one; of a conversation, each answer is one with the turns before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vlm_cli.data.problems import Problem
from vlm_cli.data.records import PLAIN_READING, Reading, Record, Records, Segment, raise_problems, read_records
from vlm_cli.generation.rows import Row
from vlm_cli.prompt import Medium, Text, format

if TYPE_CHECKING:
    from vlm_cli.generation.plan import GenerationPlan

__all__ = ["MAX_NEW_TOKENS", "Item", "ItemKey", "encode_items", "find_problem", "make_items", "read_items"]

ItemKey: TypeAlias = tuple[str, int, str]
MAX_NEW_TOKENS = 32  # of an answer, unless the user says more


@dataclass(eq=False, kw_only=True)
class Item(Row):
    """A row with an expectation: a prompt, and the answer that is right.

    Attributes:
        id: of the record; its line if it has none.
        kind: by which scores are grouped.
        prompt: in reading order.
        expected: the right answer.
        record: that asks.
        earlier: the turns before the prompt, with the answers that are right.
    """

    id: str
    kind: str | None
    prompt: tuple[Text | Medium, ...]
    expected: str
    record: Record
    earlier: tuple[Segment, ...] = ()

    def copy(self) -> Item:
        """Return the question without tokens and answers, for another model."""
        return Item(
            line=self.line,
            id=self.id,
            kind=self.kind,
            prompt=self.prompt,
            expected=self.expected,
            record=self.record,
            earlier=self.earlier,
        )

    @property
    def key(self) -> ItemKey:
        """What tells the item from the others of its data."""
        return self.record.shard, self.line, self.id

    @property
    def asked(self) -> list[Text | Medium]:
        """The earlier turns and the prompt, each turn on a line of its own."""
        lines = [[*turn.parts, Text("\n")] for turn in self.earlier]
        return [part for line in (*lines, self.prompt) for part in line]

    def to_dict(self) -> dict[str, Any]:
        """Return the line of an item without an answer in the file of answers. `error` shows no content of a file."""
        assert self.error is not None
        prompt = format(self.asked)
        return {
            "id": self.id,
            "kind": self.kind,
            "prompt": prompt,
            "expected": self.expected,
            "error": self.error.public,
        }


def read_items(path: Path, limit: int | None = None, reading: Reading = PLAIN_READING) -> tuple[list[Item], Records]:
    """Read and check a file of records; return the first `limit` items, and all records.

    Raises:
        DataError: if the file cannot be read, or listing every line that cannot be used.
    """
    records = read_records(path, reading)
    raise_problems(records, [Problem.of(r, problem) for r in records.good if (problem := find_problem(r))])
    return [item for record in records.good[:limit] for item in make_items(record)], records


def find_problem(record: Record) -> str | None:
    """Say why a record has no single answer that could be compared; None if it has one."""
    asked = [segment for segment in record.segments if not segment.is_target]
    if any(not any(isinstance(part, Medium) or part.text.strip() for part in segment.parts) for segment in asked):
        return "asks nothing: its prompt is empty."
    if any(isinstance(part, Medium) for part in record.segments[1].parts):
        return 'is a "text" with images in what would be the answer. Write a "prompt" and its "completion".'
    if _has_half_characters(record):
        return r"holds half a character, \ud800 to \udfff, which is no text."
    return None


def _has_half_characters(record: Record) -> bool:
    """Tell whether a record holds halves of characters: JSON can spell them, and no tokenizer or file takes them."""
    texts = [
        part.text if isinstance(part, Text) else part.source for segment in record.segments for part in segment.parts
    ]
    return any("\ud800" <= x <= "\udfff" for text in (*texts, record.id, record.kind or "") for x in text)


def make_items(record: Record) -> list[Item]:
    """Return an item for each answer of a record; of several, the id tells the turn."""
    num_turns = len(record.segments) // 2
    return [
        Item(
            line=record.line,
            id=record.id if num_turns == 1 else f"{record.id}, turn {turn + 1}",
            kind=record.kind,
            prompt=record.segments[2 * turn].parts,
            expected="".join(part.text for part in record.segments[2 * turn + 1].parts if isinstance(part, Text)),
            record=record,
            earlier=record.segments[: 2 * turn],
        )
        for turn in range(num_turns)
    ]


def encode_items(items: Sequence[Item], records: Records, plan: GenerationPlan) -> None:
    """Turn the prompts of items into tokens, and check that each leaves room for a whole answer.

    Raises:
        DataError: listing every line whose prompt or answer the model has no room for.
    """
    problems: list[Problem] = []
    loader = records.loader()
    for item in items:
        record = item.record
        item.encode(plan, item.prompt, loader, is_turns=record.is_turns, system=record.system, earlier=item.earlier)
        num_tokens, most = len(item.ids), plan.max_new_tokens
        if problem := plan.budget.problem(num_tokens, item.media):
            problems.append(Problem.of(record, problem))
        elif problem := plan.budget.problem(num_tokens + most, item.media):
            problems.append(Problem.of(record, f"with --max-new-tokens {most}, {problem}"))
        else:
            item.reserve(plan)
    raise_problems(records, problems)
