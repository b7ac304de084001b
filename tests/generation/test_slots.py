"""Rows that begin and end at different times are answered as each alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper

from tests.support import tiny
from vlm_cli.generation.slot_choice import find_slot_problem
from vlm_cli.generation.slots import Chooser, Slots
from vlm_cli.modeling.generation import ForbidToken
from vlm_cli.modeling.prompt_cache import PromptCache

LENGTHS = (3, 17, 1, 9, 25, 2, 5, 12)  # tokens of the answers
PROMPTS = (9, 8, 14, 10, 30, 8, 11, 9)  # tokens of the prompts
MEDIA = (1, 0, 3, 2, 1, 0, 2, 1)


@dataclass(eq=False)
class Prompt:
    """A row as `Slots` knows it."""

    line: int
    inputs: tiny.Row
    room: int
    ids: list[int] = field(default_factory=list)


def prompts(model: Any) -> list[Prompt]:
    found = zip(MEDIA, PROMPTS, LENGTHS, strict=True)
    return [Prompt(i, tiny.row(model, media, length, seed=i), room) for i, (media, length, room) in enumerate(found)]


def processors(model: Any, *more: Any) -> LogitsProcessorList:
    return LogitsProcessorList([ForbidToken(model.config.media_token_id), *more])


def read(model: Any, rows: list[Prompt], **more: Any) -> Any:
    inputs = tiny.collate([row.inputs for row in rows])
    told = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    return model.generate(**inputs, **told, **more)


def in_slots(model: Any, rows: list[Prompt], most: int, slots: Slots, **more: Any) -> dict[int, list[int]]:
    """The tokens of each row, by its number; free slots are taken one or two at a time."""
    found, waiting = {}, list(rows)
    while waiting or slots.active:
        free = most - len(slots.active)
        new, waiting = waiting[: min(free, 2)], waiting[min(free, 2) :]
        over = slots.join(new, read(model, new, **more)) if new else []
        assert over is not None
        if slots.active:
            over += slots.advance()
        found |= {seat.row.line: seat.tokens for seat in over}
    return found


def alone(model: Any, row: Prompt) -> list[int]:
    inputs = row.inputs.inputs()
    told = {"max_new_tokens": row.room, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **told)[0, inputs["lang_x"].shape[1] :].tolist()


def greedy(model: Any, **more: Any) -> Slots:
    return Slots(model, Chooser(processors(model), do_sample=False), lambda row, ids, newest: False, **more)


@torch.inference_mode()
@pytest.mark.sample(3)
@pytest.mark.parametrize("fusion", [*tiny.FUSIONS, {"type": "cross-attention", "attend": "all"}], ids=str)
@pytest.mark.parametrize(
    "language_model", ["llama", "opt", "gpt2", "mistral", "bloom", "qwen3", "gemma3_text", "falcon", "mpt", "gpt_neox"]
)
def test_rows_that_take_free_slots(language_model, fusion):
    model = tiny.open_gates(tiny.build(language_model=language_model, fusion=fusion))
    model.generation_config.eos_token_id = None
    rows = prompts(model)
    expected = {row.line: alone(model, row) for row in rows}
    assert find_slot_problem(model) is None
    slots = greedy(model)
    assert in_slots(model, rows, 3, slots) == expected
    # Three slots that wait for the longest row of each batch would decode more.
    batches = sum(3 * (max(LENGTHS[i : i + 3]) - 1) for i in range(0, len(LENGTHS), 3))
    assert slots.decoded < 0.8 * batches
    assert in_slots(model, rows[::-1], 4, greedy(model, look_every=8)) == expected


@torch.inference_mode()
def test_a_row_that_sees_what_was_in_its_slot_before_answers_otherwise(monkeypatch):
    model = tiny.open_gates(tiny.build())
    model.generation_config.eos_token_id = None
    rows = prompts(model)[:4]
    expected = in_slots(model, rows, 2, greedy(model))
    step = Slots._step

    def sees_all(self: Slots, ahead: int) -> Any:
        starts = [(seat, seat.start) for seat in self.active]
        for seat, start in starts:
            seat.start = max(0, start - 2)
        found = step(self, ahead)
        for seat, start in starts:
            seat.start = start
        return found

    monkeypatch.setattr(Slots, "_step", sees_all)
    assert in_slots(model, rows, 2, greedy(model)) != expected


@torch.inference_mode()
@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream"])
def test_rows_with_a_common_beginning(fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion))
    model.generation_config.eos_token_id = None
    rows = prompts(model)
    shots = torch.randint(1, tiny.VOCABULARY, (1, 20))
    for row in rows:
        row.inputs = tiny.Row(None, torch.cat([shots, row.inputs.lang_x.where(row.inputs.lang_x < 60, 5)], dim=1))
    cache = PromptCache()
    found = in_slots(model, rows, 4, greedy(model), prompt_cache=cache)
    assert cache.reused >= 20
    assert found == {row.line: alone(model, row) for row in rows}


@torch.inference_mode()
def test_a_sample_depends_on_its_seed_and_line_alone():
    model = tiny.open_gates(tiny.build())
    model.generation_config.eos_token_id = None
    rows = prompts(model)

    def sample(seed: int | None, most: int, rows: list[Prompt]) -> dict[int, list[int]]:
        choose = Chooser(processors(model, TemperatureLogitsWarper(2.0)), do_sample=True, seed=seed)
        return in_slots(model, rows, most, Slots(model, choose, lambda row, ids, newest: False, look_every=most))

    first = sample(1, 3, rows)
    assert sample(1, 4, rows[::-1]) == first
    assert sample(2, 3, rows) != first
    assert sample(None, 3, rows) != sample(None, 3, rows)


def test_tokens_are_drawn_by_their_chances():
    choose = Chooser(LogitsProcessorList(), do_sample=True)
    chances = torch.tensor([0.1, 0.0, 0.6, 0.3])
    numbers = (torch.arange(1000) + 0.5) / 1000
    drawn = choose(chances.log().expand(1000, -1), numbers)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 0, 600, 300]
    assert choose(chances.log().expand(2, -1), torch.tensor([0.0, 1.0 - 2**-24])).tolist() == [0, 3]


@torch.inference_mode()
def test_a_state_cannot_be_replaced():
    model = tiny.build(language_model="mamba", fusion="language-stream")
    assert "has a state in which rows cannot be replaced" in find_slot_problem(model)
    rows = prompts(model)[:1]
    assert greedy(model).join(rows, read(model, rows)) is None
