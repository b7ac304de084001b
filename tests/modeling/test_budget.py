"""Positions that prompts take in a language model, against what the model itself computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support import tiny
from vlm_cli.data.records import read_records
from vlm_cli.errors import DataError, PromptError
from vlm_cli.evaluation.items import Item, encode_items
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.prompt import Text
from vlm_cli.tiling import MediumSize


@pytest.mark.sample(2)
@pytest.mark.parametrize("fusion", tiny.FUSIONS)
@pytest.mark.parametrize("tokenizer", ["perceiver", "linear", {"type": "linear", "frames": "mean"}], ids=str)
@pytest.mark.parametrize("frames", [(1,), (1, 2), (3, 1, 2)], ids=str)
def test_positions_are_those_of_the_key_value_cache(fusion, tokenizer, frames):
    model = tiny.build(tokenizer=tokenizer, fusion=fusion)
    row = tiny.row(model, len(frames), frames=max(frames))
    mask = torch.arange(max(frames)) < torch.tensor(frames)[None, :, None]
    output = model(vision_x=row.vision_x, lang_x=row.lang_x, vision_mask=mask, use_cache=True)
    budget = ContextBudget.of(model)
    positions = budget.positions(row.lang_x.shape[1], [MediumSize(num_frames=n) for n in frames])
    assert positions == output.past_key_values.get_seq_length()
    assert budget.left(positions) == 128 - positions


def test_clips_of_different_lengths_take_different_positions():
    budget = ContextBudget.of(tiny.build(tokenizer="linear", fusion="language-stream"))
    assert budget.positions(3, [MediumSize(num_frames=2)]) == 1 + 2 * 4 + 1  # 4 patches of each frame
    assert budget.positions(4, [MediumSize(), MediumSize(num_frames=3)]) == 2 + 4 + 12


def test_rows_are_padded_to_one_number_of_tokens_and_then_of_positions():
    model = tiny.build(tokenizer="linear", fusion="language-stream")
    rows = tiny.rows(model, (1, 0, 3))
    budget = ContextBudget.of(model)
    lengths = [r.lang_x.shape[1] for r in rows]
    alone = [(n, budget.positions(n, [MediumSize()] * media)) for n, media in zip(lengths, (1, 0, 3), strict=True)]
    output = model(**tiny.collate(rows), use_cache=True)
    assert budget.positions_together(alone) == output.past_key_values.get_seq_length()


@pytest.mark.parametrize("language_model", ["llama", "mpt"])
def test_a_prompt_that_is_too_long_is_refused(language_model):
    """MPT calls its context `max_seq_len`."""
    budget = ContextBudget.of(tiny.build(language_model=language_model))
    assert budget.context == 128
    assert budget.room(120, 4) == 4 and budget.room(127, 4) == 1
    with pytest.raises(PromptError, match="takes 128 positions, but the language model has 128"):
        budget.room(128, 4)
    assert budget.problem(128, []) is None
    assert budget.problem(130, [MediumSize()]) == (
        "takes 130 positions (1 of them for 1 image), but the language model has 128. Shorten it."
    )


def test_a_language_model_without_a_limit_has_room():
    budget = ContextBudget.of(tiny.build(language_model="mamba"))
    assert budget.context is None and budget.left(10**6) is None
    assert budget.room(10**6, 4) == 4 and budget.problem(10**6, []) is None


def test_a_tokenizer_that_numbers_media_takes_so_many():
    budget = ContextBudget.of(tiny.build(tokenizer={"type": "perceiver", "max_num_media": 2}))
    budget.check_media([MediumSize()] * 2)
    assert budget.problem(9, [MediumSize()] * 3) == "has 3 images, but the vision tokenizer was made for at most 2."
    with pytest.raises(PromptError, match="the prompt has 3 images, but the vision tokenizer was made for at most 2"):
        budget.check_media([MediumSize()] * 3)
    ContextBudget.of(tiny.build()).check_media([MediumSize(1000)] * 1000)


def test_a_tokenizer_that_numbers_frames_takes_so_many():
    budget = ContextBudget.of(tiny.build(tokenizer={"type": "perceiver", "max_num_frames": 2}))
    budget.check_media([MediumSize(2)] * 9)
    words = "has a medium of 3 frames, but the vision tokenizer was made for at most 2. Write <video:FILE?frames=2>."
    assert budget.problem(9, [MediumSize(), MediumSize(3)]) == words
    with pytest.raises(PromptError, match="the prompt has a medium of 3 frames"):
        budget.check_media([MediumSize(3)])


def test_evaluation_checks_lengths_on_mpt(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "What?", "completion": " A cat."}')
    records = read_records(file)
    (record,) = records.good
    ids = list(range(100))
    tokenizer = SimpleNamespace(added_tokens_decoder={})
    processor = SimpleNamespace(
        encode=lambda parts, **options: ids, image_processor=None, chat_program=None, tokenizer=tokenizer
    )
    item = Item(line=1, id="a", kind=None, prompt=(Text("What?"),), expected="A cat.", record=record)
    model = tiny.build(language_model="mpt")
    encode_items([item], records, GenerationPlan(model, processor, {"max_new_tokens": 28}))
    assert (item.positions, item.room) == (100, 28)
    with pytest.raises(DataError, match="with --max-new-tokens 29, takes 129 positions"):
        encode_items([item], records, GenerationPlan(model, processor, {"max_new_tokens": 29}))
