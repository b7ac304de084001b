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
from vlm_cli.evaluation.items import Item, read_items
from vlm_cli.modeling.vlm import VLM
from vlm_cli.models import load
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Text
from vlm_cli.templates.conversation import ChatFormat, Conversation
from vlm_cli.training.encoder import RecordEncoder, find_end_token
from vlm_cli.writing.choice import TemplateChoice
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


def test_the_system_stands_before_the_first_turn(model: tuple[VLM, VLMProcessor], items: list[Item]) -> None:
    _, processor = model
    text = processor.tokenizer.decode(ids_of(items[4], PromptWriter(processor, TemplateChoice("none"))))
    assert text.index("Be brief.") < text.index("One?") < text.index("no.") < text.index("Two?")
    assert isinstance(items[4].record, Record)
