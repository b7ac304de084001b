"""Items on the engine of batches: each gets the answer that it would get alone, and each image is encoded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.grid import first_of
from tests.support.questions import PROMPTS, Write
from vlm_cli import VLM
from vlm_cli.checkpoint.directory import load
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.data.record import Record
from vlm_cli.errors import DataError
from vlm_cli.evaluation.answers import GradedAnswer
from vlm_cli.evaluation.items import Item, encode_items, read_items
from vlm_cli.evaluation.run import answer_items, sort_items
from vlm_cli.generation.answers import RowAnswerer
from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium
from vlm_cli.tiling import MediumSize

RECORDS = [{"kind": kind, "prompt": prompt, "completion": " x"} for kind, prompt in PROMPTS]

Ask = Callable[..., tuple[list[Item], list[GradedAnswer], RowAnswerer]]


@pytest.fixture
def ask(folder: Path, write: Write) -> Ask:
    """Put records to a model: the items, the answers, and the engine."""

    def ask(model: str, size: int, records: list[Any] = RECORDS, **keywords: Any) -> Any:
        vlm, processor = load(str(folder / model))
        plan = GenerationPlan(vlm, processor, SamplingOptions(max_new_tokens=6).keywords())
        items, found = read_items(write(records))
        encode_items(items, found, plan)
        answerer = RowAnswerer(plan, BatchSize(size))
        return items, answer_items(answerer, items, MediaLoader(folder), **keywords), answerer

    return ask


def texts(answers: list[GradedAnswer]) -> list[str]:
    return [answer.text for answer in answers]


@pytest.mark.parametrize("fusion", first_of(["stream", "attention"]))
def test_batches_answer_as_one_at_a_time(fusion: str, ask: Ask) -> None:
    done: list[int] = []
    items, alone, _ = ask(fusion, 1, report=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert [answer.item for answer in alone] == items
    assert len(set(texts(alone))) > 3, "the model answers all alike, so that order would not show"
    for size in (2, 4, 32):
        assert texts(ask(fusion, size)[1]) == texts(alone)
    # The twin: answers in the order of the batches would not be in that of the items.
    assert sort_items(items) != items


def test_pictures_matter(ask: Ask) -> None:
    records = [{"prompt": f"<image:{x}.png>Q:", "completion": "x"} for x in ("red", "blue")]
    red, blue = texts(ask("stream", 2, records)[1])
    assert red != blue


def test_each_image_is_encoded_once(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    count, original = [], VLM.encode_vision

    def spy(self: VLM, vision_x: torch.Tensor, *args: Any) -> Any:
        count.append(vision_x.shape[:2].numel())
        return original(self, vision_x, *args)

    monkeypatch.setattr(VLM, "encode_vision", spy)
    _, _, answerer = ask("stream", 2)
    shown = [part for item in read_prompts() for part in item]
    assert (answerer.counts.images, answerer.counts.encoded) == (len(shown), len(set(shown)))
    assert sum(count) == len(set(shown)) < len(shown)


def test_an_item_that_is_answered_keeps_no_picture(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], RowAnswerer._run

    def spy(self: RowAnswerer, rows: Any, **keywords: Any) -> Any:
        seen.append(sum(len(row.images) for row in rows))
        return original(self, rows, **keywords)

    monkeypatch.setattr(RowAnswerer, "_run", spy)
    items, _, _ = ask("stream", 2)
    assert sum(seen) > 0 and not any(item.images for item in items)


def read_prompts() -> list[list[str]]:
    """The sources of each prompt."""
    return [[x.partition(">")[0] for x in prompt.split("<image:")[1:]] for _, prompt in PROMPTS]


def test_where_memory_does_not_suffice_items_are_halved(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, generate, sizes = texts(ask("stream", 4)[1]), VLM.generate, []

    def scarce(self: VLM, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return generate(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(VLM, "generate", scarce)
    assert texts(ask("stream", 4)[1]) == wanted
    assert sizes == [4, 2, 2, 2]


def test_an_item_that_is_too_large_alone_ends_the_evaluation(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: VLM, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(VLM, "generate", full)
    with pytest.raises(DataError, match=r"line 3 of 'q\.jsonl': memory does not suffice for this row alone"):
        ask("stream", 1, name="q.jsonl")


def test_similar_items_stand_together() -> None:
    def item(kind: str | None, num_images: int, length: int) -> Item:
        prompt = tuple(Medium("a") for _ in range(num_images))
        found = Item(line=1, id="1", kind=kind, prompt=prompt, expected="x", record=Record(1, "1", kind, ()))
        found.ids, found.media = [0] * length, [MediumSize()] * num_images
        return found

    items = [item("a", 1, 5), item("b", 1, 4), item("a", 3, 9), item("a", 1, 7), item(None, 2, 6)]
    assert [items.index(x) for x in sort_items(items)] == [2, 4, 1, 3, 0]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("ids", "text", "reason"),
    [
        ([5, 6, 2, 7], "<5><6>", "stop_token"),
        ([2, 2], "", "stop_token"),
        ([5, 6], "<5><6>", "length"),
        ([5, 9], "<5>", "stop_token"),
    ],
)
def test_answer_ends_at_a_stop_token(ids: list[int], text: str, reason: str, folder: Path) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **kwargs: Any) -> str:
            assert kwargs["skip_special_tokens"]
            return "".join(f"<{i}>" for i in ids)

    class Processor:
        tokenizer, chat_program = Tokenizer(), None

    model, _ = load(str(folder / "stream"))
    model.generation_config.eos_token_id = [2, 9]
    plan = GenerationPlan(model, Processor(), {"max_new_tokens": len(ids)})  # type: ignore[arg-type]
    found = plan.read([3, 4], ids, len(ids))
    assert (found.text, found.finish_reason) == (text, reason)
