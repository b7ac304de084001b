"""Batches of questions: each gets the answer that it would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.questions import PROMPTS, Write
from vlm_cli.checkpoint.directory import load
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.evaluation.answers import Answer, answer, group
from vlm_cli.evaluation.items import Item, read_items
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium, Text

KEYWORDS = SamplingOptions(max_new_tokens=6).keywords()


def items_of(write: Write) -> list[Item]:
    items, _ = read_items(write([{"kind": kind, "prompt": p, "completion": " x"} for kind, p in PROMPTS]))
    return items


@pytest.mark.parametrize("fusion", ["stream", "attention"])
def test_batches_answer_as_one_at_a_time(fusion: str, folder: Path, write: Write) -> None:
    model, processor = load(str(folder / fusion))
    items, loader = items_of(write), MediaLoader(folder)
    lengths = [len(processor.encode(item.prompt)) for item in items]
    done: list[int] = []

    def run(batches: list[list[int]]) -> list[Answer]:
        return answer(model, processor, items, batches, loader, KEYWORDS, report=done.append)

    alone = run([[i] for i in range(len(items))])
    assert done == [1, 2, 3, 4, 5, 6]
    assert [a.item for a in alone] == items
    assert len({a.text for a in alone}) > 3, "the model answers all alike, so that order would not show"
    for size in (2, 4, 32):
        assert run(group(items, lengths, size)) == alone
    # The twin: answers in the order of the batches would not be in that of the items.
    assert [i for batch in group(items, lengths, 2) for i in batch] != list(range(len(items)))


def test_pictures_matter(folder: Path, write: Write) -> None:
    model, processor = load(str(folder / "stream"))
    red, blue = (Item(1, "1", None, (Medium(f"{x}.png"), Text("Q:")), "x") for x in ("red", "blue"))
    answers = answer(model, processor, [red, blue], [[1, 0]], MediaLoader(folder), KEYWORDS)
    assert answers[0].text != answers[1].text


def test_group() -> None:
    def item(kind: str | None, num_images: int) -> Item:
        return Item(1, "1", kind, tuple(Medium("a") for _ in range(num_images)), "x")

    items = [item("a", 1), item("b", 1), item("a", 3), item("a", 1), item(None, 2)]
    assert group(items, [5, 4, 9, 7, 6], 2) == [[2, 4], [1, 3], [0]]


@pytest.mark.parametrize(("ids", "text", "ended"), [([5, 6, 2, 7], "<5><6>", True), ([2, 2], "", True),
                                                    ([5, 6], "<5><6>", False), ([5, 9], "<5>", True)])  # fmt: skip
def test_answer_ends_at_a_stop_token(ids: list[int], text: str, ended: bool) -> None:
    from vlm_cli.evaluation.answers import _answer

    class Processor:
        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return "".join(f"<{i}>" for i in ids)

    found = _answer(Item(1, "1", None, (), text), ids, {2, 9}, Processor())
    assert (found.text, found.ended, found.exact) == (text, ended, True)
