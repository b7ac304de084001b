"""Rows that begin and end at different times are answered as each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper

from tests.support import tiny
from tests.support.recorded_graph import record
from vlm_cli.generation.slot_choice import find_slot_problem
from vlm_cli.generation.slots import Chooser, Slots
from vlm_cli.modeling.decoding import static as static_step
from vlm_cli.modeling.decoding import static_slots
from vlm_cli.modeling.decoding.growing_slots import GrowingSlots
from vlm_cli.modeling.decoding.read_rows import ReadRows
from vlm_cli.modeling.decoding.slot_step import SlotStep
from vlm_cli.modeling.decoding.static_slots import StaticSlots
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


def static(model: Any) -> StaticSlots:
    return StaticSlots(model, graph=record)


STEPS = {"growing": GrowingSlots, "static": static}


@pytest.fixture(params=STEPS)
def make(request, monkeypatch) -> Callable[[Any], SlotStep]:
    """Makes a step, whose rows move and whose tensors are made anew every few tokens if they are static."""
    monkeypatch.setattr(static_step, "ROUND", 1)
    monkeypatch.setattr(static_slots, "MIN_SPARE", 3)
    return STEPS[request.param]


def slots_of(make: Any, model: Any, choose: Chooser | None = None, **more: Any) -> Slots:
    """Slots of rows without stop tokens, greedy unless told otherwise."""
    choose = choose or Chooser(processors(model), do_sample=False)
    return Slots(model, partial(make, model), choose, lambda row, ids, newest: False, **more)


PLAIN = ["llama", "opt", "gpt2", "mistral", "bloom", "qwen3", "gemma3_text", "falcon", "mpt", "gpt_neox"]
OTHERS = [name for name in tiny.LANGUAGE_MODELS if name not in PLAIN]


@torch.inference_mode()
@pytest.mark.sample(4)
@pytest.mark.parametrize("fusion", [*tiny.FUSIONS, {"type": "cross-attention", "attend": "all"}], ids=str)
@pytest.mark.parametrize("language_model", [*PLAIN, *OTHERS])
def test_rows_that_take_free_slots(language_model, fusion, make):
    model = tiny.open_gates(tiny.build(language_model=language_model, fusion=fusion))
    model.generation_config.eos_token_id = None
    if (problem := find_problem(model, make)) is not None:
        assert make is static or language_model in OTHERS
        pytest.skip(problem)
    rows = prompts(model)
    expected = {row.line: alone(model, row) for row in rows}
    slots = slots_of(make, model)
    assert in_slots(model, rows, 3, slots) == expected
    # Three slots that wait for the longest row of each batch would decode more.
    batches = sum(3 * (max(LENGTHS[i : i + 3]) - 1) for i in range(0, len(LENGTHS), 3))
    assert slots.decoded < 0.8 * batches
    assert in_slots(model, rows[::-1], 4, slots_of(make, model, look_every=8)) == expected


def find_problem(model: Any, make: Any) -> str | None:
    """What the commands say of a model that is to have such a step."""
    model.generation_config.cache_implementation = "static" if make is static else None
    problem = find_slot_problem(model)
    model.generation_config.cache_implementation = None
    return problem


@torch.inference_mode()
def test_a_row_that_sees_what_was_in_its_slot_before_answers_otherwise(monkeypatch):
    model = tiny.open_gates(tiny.build())
    model.generation_config.eos_token_id = None
    rows = prompts(model)[:4]
    expected = in_slots(model, rows, 2, slots_of(GrowingSlots, model))
    step = GrowingSlots.__call__

    def sees_all(self: GrowingSlots, tokens: torch.Tensor) -> torch.Tensor:
        starts = self._starts
        self._starts = [None if start is None else max(0, start - 2) for start in starts]
        found = step(self, tokens)
        self._starts = starts
        return found

    monkeypatch.setattr(GrowingSlots, "__call__", sees_all)
    assert in_slots(model, rows, 2, slots_of(GrowingSlots, model)) != expected


@torch.inference_mode()
@pytest.mark.parametrize("make", ["static"], indirect=True)
def test_static_rows_move_and_grow(make, monkeypatch):
    model = tiny.open_gates(tiny.build())
    model.generation_config.eos_token_id = None
    rows, move, is_new = [*prompts(model), *prompts(model)], StaticSlots._move, []

    def watch(self: StaticSlots, old: Any, source: slice, target: slice) -> None:
        is_new.append(self._step is not old)
        move(self, old, source, target)

    monkeypatch.setattr(StaticSlots, "_move", watch)
    expected = in_slots(model, rows, 3, slots_of(make, model))
    assert set(is_new) == {False, True} and len(is_new) < sum(LENGTHS) / 2

    def lose(self: StaticSlots, old: Any, source: slice, target: slice) -> None:
        move(self, old, source, target)
        keys = self._step.cache.layers[0].keys
        keys.copy_(keys.roll(1, 2))

    monkeypatch.setattr(StaticSlots, "_move", lose)
    assert in_slots(model, rows, 3, slots_of(make, model)) != expected


@torch.inference_mode()
def test_a_free_slot_may_go_on_beyond_the_context():
    model = tiny.build(language_model="gpt2")
    context = model.config.get_text_config(decoder=True).max_position_embeddings
    rows, step = prompts(model)[:1], StaticSlots(model)
    one = ReadRows.of(model, read(model, rows))
    step.put([0, 1], ReadRows.of(model, read(model, rows * 2)))
    step.release(1)
    for _ in range(3):  # the row in slot 0 is over each time, and slot 1 stays free
        step.release(0)
        step.put([0], one)
        for _ in range(context // 2):
            logits = step(torch.ones(2, dtype=torch.long))
    assert logits.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream"])
def test_rows_with_a_common_beginning(fusion, make):
    model = tiny.open_gates(tiny.build(fusion=fusion))
    model.generation_config.eos_token_id = None
    rows = prompts(model)
    shots = torch.randint(1, tiny.VOCABULARY, (1, 20))
    for row in rows:
        row.inputs = tiny.Row(None, torch.cat([shots, row.inputs.lang_x.where(row.inputs.lang_x < 60, 5)], dim=1))
    cache = PromptCache()
    found = in_slots(model, rows, 4, slots_of(make, model), prompt_cache=cache)
    assert cache.reused >= 20
    assert found == {row.line: alone(model, row) for row in rows}


@pytest.mark.sample(1)
@torch.inference_mode()
def test_a_sample_depends_on_its_seed_and_line_alone(make):
    model = tiny.open_gates(tiny.build())
    model.generation_config.eos_token_id = None
    rows = prompts(model)

    def sample(seed: int | None, most: int, rows: list[Prompt]) -> dict[int, list[int]]:
        choose = Chooser(processors(model, TemperatureLogitsWarper(2.0)), do_sample=True, seed=seed)
        return in_slots(model, rows, most, slots_of(make, model, choose, look_every=most))

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
    assert slots_of(GrowingSlots, model).join(rows, read(model, rows)) is None
