"""Rows that begin and end at different times, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from tests.support import seed_torch, tiny
from tests.support.grid import grid
from tests.support.recorded_graph import record
from vlm_cli.modeling.decoding import static
from vlm_cli.modeling.decoding.slots import Slots
from vlm_cli.modeling.vlm import VLM

ROOM = 7
QUICK = ("llama", "mistral")


def prompts(model: VLM, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Prompts of several lengths, each with its number of images."""
    found = []
    for number, count in enumerate(counts):
        inputs = tiny.batch(model, (count,))
        text = torch.randint(1, 70, (1, number % 4))
        ids = torch.cat([inputs["lang_x"], text], dim=1)
        media = {"vision_x": inputs["vision_x"] * (1 + number)} if count else {}
        found.append({"lang_x": ids, "attention_mask": torch.ones_like(ids), **media})
    return found


def alone(model: VLM, inputs: dict[str, Any], room: int, stop: int | None, **options: Any) -> list[int]:
    ids = model.generate(**inputs, max_new_tokens=room, do_sample=False, eos_token_id=stop, **options)
    return ids[0, inputs["lang_x"].shape[1] :].tolist()


def serve(slots: Slots, waiting: list[dict[str, Any]], rooms: list[int]) -> tuple[dict[int, list[int]], int]:
    """Answer all prompts; a free row takes the next one."""
    owner: dict[int, int] = {}
    answers: dict[int, list[int]] = {number: [] for number in range(len(waiting))}
    next_one, steps = 0, 0
    while next_one < len(waiting) or len(slots.free) < slots.rows:
        written = []
        for row in slots.free:
            if next_one < len(waiting):
                owner[row] = next_one
                written += slots.admit([row], [rooms[next_one]], **waiting[next_one])
                answers[next_one] += written[-1].tokens
                next_one += 1
        for x in slots.step():
            answers[owner[x.row]] += x.tokens
        steps += 1
    return answers, steps


@pytest.mark.sample(2)
@grid(language_model=tiny.LANGUAGE_MODELS, fusion=tiny.FUSIONS, quick={"language_model": QUICK})
def test_each_row_is_answered_as_if_it_were_alone(language_model, fusion, monkeypatch):
    seed_torch(0)
    monkeypatch.setattr(static, "ROUND", 1)
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    if not model.lang_model._can_compile_fullgraph:
        pytest.skip("Transformers has no static cache for it")
    waiting = prompts(model, (2, 1, 0, 3, 1, 2))
    rooms = [ROOM, 3, 5, ROOM, 1, 6]
    stop = alone(model, waiting[3], ROOM, None)[2]
    expected = {i: alone(model, x, room, stop) for i, (x, room) in enumerate(zip(waiting, rooms, strict=True))}
    longest = max(x["lang_x"].shape[1] for x in waiting) + 3 * (model.num_positions() - 1)
    slots = Slots(model, 2, longest=longest, room=ROOM, stop_ids=[stop], look_every=2, graph=record)
    found, steps = serve(slots, waiting, rooms)
    assert found == expected
    assert steps < sum(map(len, expected.values()))
    assert len({tuple(x) for x in expected.values()}) > 1  # one answer in another's place would be seen


def test_penalties_are_those_of_each_row_alone(monkeypatch):
    model = tiny.open_gates(tiny.build())
    waiting = prompts(model, (1, 2, 1))
    options = {"repetition_penalty": 1.5, "min_new_tokens": 4}
    stop = alone(model, waiting[1], ROOM, None, repetition_penalty=1.5)[1]
    expected = {i: alone(model, x, ROOM, stop, **options) for i, x in enumerate(waiting)}
    settings: dict[str, Any] = {"longest": 16, "room": ROOM, "stop_ids": [stop]}
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    slots = Slots(model, 2, **settings, processors=processors, min_new_tokens=4)
    assert serve(slots, waiting, [ROOM] * 3)[0] == expected
    assert serve(Slots(model, 2, **settings), waiting, [ROOM] * 3)[0] != expected


def test_rows_that_lose_their_place_are_seen(monkeypatch):
    model = tiny.open_gates(tiny.build())
    waiting = prompts(model, (2, 1, 1))
    expected = {i: alone(model, x, ROOM, tiny.PAD) for i, x in enumerate(waiting)}

    def serve_all() -> dict[int, list[int]]:
        return serve(Slots(model, 2, longest=16, room=ROOM, stop_ids=[tiny.PAD]), waiting, [ROOM] * 3)[0]

    assert serve_all() == expected
    monkeypatch.setattr(Slots, "_move", lambda slots, offset: setattr(slots, "_at", slots._at + offset))
    assert serve_all() != expected


def test_rows_may_be_read_together_and_released():
    model = tiny.open_gates(tiny.build(fusion="language-stream"))
    inputs = tiny.batch(model, (2, 1))
    slots = Slots(model, 3, longest=32, room=ROOM, look_every=2)
    first = slots.admit([2, 0], **inputs)
    slots.release(0)
    assert slots.free == [0, 1]
    both = model.generate(**inputs, max_new_tokens=ROOM, do_sample=False)[:, inputs["lang_x"].shape[1] :]
    assert [x.tokens for x in first] == both[:, :1].tolist()
    rest = [x for _ in range(3) for x in slots.step()]
    assert [x.row for x in rest] == [2, 2, 2]
    assert first[0].tokens + [token for x in rest for token in x.tokens] == both[0].tolist()
    assert slots.free == [0, 1, 2] and slots.step() == []
