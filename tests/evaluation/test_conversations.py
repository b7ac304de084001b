"""Conversations as items: each answer is asked for behind the turns that a run learns it behind, and a chat feeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.training import write
from vlm_cli.data.record import Record
from vlm_cli.decoding import decode_after
from vlm_cli.errors import DataError
from vlm_cli.evaluation.items import Item, encode_items, read_items
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import DEMO, load, read_processor_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Text
from vlm_cli.templates.conversation import ChatFormat, Conversation
from vlm_cli.training.encoder import RecordEncoder
from vlm_cli.writing.choice import AUTO, TemplateChoice
from vlm_cli.writing.plain import find_end_token
from vlm_cli.writing.writer import PromptWriter

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"id": "a", "messages": [
        {"role": "user", "content": "What is in the image?"}, {"role": "assistant", "content": "a small cross."},
        {"role": "user", "content": "And here? <image>"}, {"role": "assistant", "content": " a heart. "},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes."}]},
    {"id": "b", "system": "Be brief.",
     "texts": [{"user": "One?", "assistant": "no."}, {"user": "Two?", "assistant": "no."}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> tuple[VLM, VLMProcessor]:
    return load("demo")


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    rows = [ROWS[0] | {"images": ["black.png"]}, ROWS[1]]
    return read_items(write(tmp_path / "rows.jsonl", rows))[0]


def ids_of(item: Item, writer: PromptWriter, earlier: int | None = None) -> list[int]:
    before = item.earlier if earlier is None else item.earlier[:earlier]
    record = item.record
    return writer.encode(item.prompt, is_turns=record.is_turns, system=record.system, earlier=before)


def test_each_answer_is_an_item(items: list[Item]) -> None:
    assert [item.id for item in items] == ["a, turn 1", "a, turn 2", "a, turn 3", "b, turn 1", "b, turn 2"]
    assert [item.expected.strip() for item in items] == ["a small cross.", "a heart.", "yes.", "no.", "no."]
    assert [len(item.earlier) for item in items] == [0, 2, 4, 0, 2]


def test_a_template_writes_the_turns_before_as_a_run_learns_them(
    model: tuple[VLM, VLMProcessor], items: list[Item], tmp_path: Path
) -> None:
    vlm, processor = model
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    writer = PromptWriter(processor, TemplateChoice.parse(str(tmp_path / "chat.jinja")))
    encoder = RecordEncoder(writer, find_end_token(vlm, processor))
    for record in {item.record.id: item.record for item in items}.values():
        (encoded,) = encoder.encode(record)
        starts = [i for i, learned in enumerate(encoded.is_target) if learned and not encoded.is_target[i - 1]]
        of_record = [item for item in items if item.record is record]
        assert [ids_of(item, writer) for item in of_record] == [encoded.ids[:start] for start in starts]
        assert ids_of(of_record[-1], writer, earlier=0) != encoded.ids[: starts[-1]]


def test_without_a_template_a_run_learns_each_answer_behind_what_it_is_asked_for(
    model: tuple[VLM, VLMProcessor], items: list[Item]
) -> None:
    """An end token behind an earlier answer, which no chat feeds, is not there; the answer's last token stays whole."""
    processor = read_processor_of(str(DEMO))
    processor.tokenizer.add_tokens([".\n"])  # as a tokenizer with such a token would read the texts in one piece
    writer, end = PromptWriter(processor, TemplateChoice("none")), find_end_token(*model)
    encoder = RecordEncoder(writer, end)
    for record in {item.record.id: item.record for item in items}.values():
        asked = [ids_of(item, writer) for item in items if item.record is record]
        learned = encoder.encode(record)
        assert [x.ids[: len(ids)] for x, ids in zip(learned, asked, strict=True)] == asked
        assert [x.is_target for x in learned] == [
            [False] * len(ids) + [True] * (len(x.ids) - len(ids)) for x, ids in zip(learned, asked, strict=True)
        ]
        assert all(x.ids[-1] == end and x.ids.count(end) == 1 for x in learned)
    assert "one sequence for each answer" in encoder.notes[-1]
    assert ".\n" in processor.tokenizer.tokenize("cross.\n")


def test_without_a_template_the_turns_before_are_those_of_a_chat(
    model: tuple[VLM, VLMProcessor], items: list[Item]
) -> None:
    _, processor = model
    writer = PromptWriter(processor, TemplateChoice("none"))
    last = items[2]
    conversation = Conversation.begin(ChatFormat(processor, plain=True))
    for asked, answer in zip(last.earlier[::2], last.earlier[1::2], strict=True):
        conversation = conversation.ask(asked.parts)
        text = " " + "".join(part.text for part in answer.parts if isinstance(part, Text)).strip()
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
        conversation = conversation.answer(ids, text, partial(decode_after, processor.tokenizer, conversation.ids))
    expected = list(conversation.ask(last.prompt).ids)
    assert ids_of(last, writer) == expected
    assert ids_of(last, writer, earlier=2) != expected


@pytest.mark.parametrize("choice", ["auto", "all"])
def test_turns_of_own_records_are_asked_as_a_run_learns_them(
    model: tuple[VLM, VLMProcessor], tmp_path: Path, choice: str
) -> None:
    vlm, processor = model
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    turns = [{"prompt": "Q: What? A:", "completion": " black."}, {"prompt": "<image> Here?", "completion": " a cross."}]
    row = {"prompt": "<image>", "turns": [*turns, turns[0]], "images": ["black.png", "black.png"], "id": "a"}
    items, records = read_items(write(tmp_path / "rows.jsonl", [row]))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    writer = PromptWriter(processor, TemplateChoice.parse(str(tmp_path / "chat.jinja")) if choice == "all" else AUTO)
    plan = GenerationPlan(vlm, processor, {"max_new_tokens": 4}, writer=writer)
    encode_items(items, records, plan)
    (encoded,) = RecordEncoder(writer, plan.end_id).encode(items[0].record)
    starts = [i for i, learned in enumerate(encoded.is_target) if learned and not encoded.is_target[i - 1]]
    assert [item.ids for item in items] == [encoded.ids[:start] for start in starts]
    assert [item.id for item in items] == ["a, turn 1", "a, turn 2", "a, turn 3"]
    assert [len(item.sources) for item in items] == [1, 2, 2]
    # The twin: as turns of a chat, the same texts have other tokens.
    as_chat = writer.encode(items[2].prompt, is_turns=True, earlier=items[2].earlier)
    assert (as_chat == items[2].ids) == (choice == "all")


def test_requests_with_answers_are_items(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "no."}]
    body = {"model": "x", "messages": said, "temperature": 0.5}
    rows = [{"custom_id": "r 1", "method": "POST", "url": "/v1/chat/completions", "body": body}]
    items, records = read_items(write(tmp_path / "rows.jsonl", rows))
    assert [(item.id, item.expected, item.record.is_turns) for item in items] == [("r 1", "no.", True)]
    assert any('has "temperature" in its body, which is not read' in note for note in records.notes)
    with pytest.raises(DataError, match="turn 1, the last, has no answer"):
        read_items(write(tmp_path / "rows.jsonl", [{**rows[0], "body": {"messages": said[:1]}}]))


def test_the_system_stands_before_the_first_turn(model: tuple[VLM, VLMProcessor], items: list[Item]) -> None:
    _, processor = model
    text = processor.tokenizer.decode(ids_of(items[4], PromptWriter(processor, TemplateChoice("none"))))
    assert text.index("Be brief.") < text.index("One?") < text.index("no.") < text.index("Two?")
    assert isinstance(items[4].record, Record)
