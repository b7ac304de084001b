"""Scenes as files: pictures, and the records about them that `vlm train` and `vlm eval` read."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

from examples.scenes.draw import draw
from examples.scenes.texts import (
    QUESTION_KINDS,
    Question,
    ask,
    ask_about,
    caption,
    caption_prompt,
    question_prompt,
    sample_few_shot,
)
from examples.scenes.world import Scene, Split, sample_scene, stream
from vlm_cli.prompt import Medium, Text
from vlm_cli.prompt import format as format_prompt

__all__ = ["Form", "Item", "Series", "write"]

Form: TypeAlias = Literal["turns", "single"]

FEW_SHOT = 0.15  # share of the records
CAPTIONS = 0.3  # share of the other records, if each has a single answer

#: Later turns see earlier ones, and a caption tells most answers. So it comes first in few records, with few questions
#: after it; and last in the others, where the questions before it tell little of it.
CAPTION_FIRST = 0.35  # share of the records of many turns
QUESTIONS_AFTER_CAPTION = 2
QUESTIONS = 6  # of a record that begins with a question


@dataclass(frozen=True)
class Item:
    """A record, and what its pictures show.

    Attributes:
        record: a line of `data.jsonl`.
        scenes: by the picture's file name; the last one is asked about.
        num_things: how many things that one may have; None for any number.
    """

    record: dict[str, Any]
    scenes: dict[str, Scene]
    num_things: int | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Items without end, each with its own random numbers."""

    split: Split = "train"  # what the scenes show
    seed: int = 0
    form: Form = "turns"  # several turns behind one image, or a single prompt, worded as a first turn is
    wrong_image: bool = False  # replace the picture that is asked about by that of another scene; the words stay

    def item(self, index: int) -> Item:
        """The item at a place, from 0."""
        rng = stream("item", self.split, self.seed, self.form, index)
        name = f"{self.split}-{self.seed}-{index:06}"
        if rng.random() < FEW_SHOT:
            item = _few_shot(rng, name, index, self.split)
        else:
            image = f"images/{index:06}.png"
            scene, record = (_turns if self.form == "turns" else _single)(rng, image, self.split)
            item = Item({"id": name, **record}, {image: scene})
        return _with_wrong_image(item, stream("wrong", name), self.split) if self.wrong_image else item

    def items(self, num: int) -> Iterator[Item]:
        """The first `num` items."""
        return map(self.item, range(num))


def write(out: Path, series: Series, num: int, *, workers: int = 1) -> Path:
    """Write `num` records to `out/data.jsonl` and their pictures to `out/images`; return the former.

    The same arguments write the same bytes, however many processes work.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    work = partial(_write_item, out, series)
    path, unfinished = out / "data.jsonl", out / "data.jsonl.partial"
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        if workers == 1:
            file.writelines(map(work, range(num)))
        else:
            # Not forked: a parent that has run torch may hold locks.
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                file.writelines(pool.imap(work, range(num), chunksize=64))
    return unfinished.replace(path)


def _write_item(out: Path, series: Series, index: int) -> str:
    item = series.item(index)
    for name, scene in item.scenes.items():
        draw(scene).save(out / name, compress_level=1)
    return json.dumps(item.record) + "\n"


def _few_shot(rng: Random, name: str, index: int, split: Split) -> Item:
    """Only the last answer is learned: the first cannot be known, and nothing may stand between the examples."""
    few = sample_few_shot(rng, split)
    images = [f"images/{index:06}-{number}.png" for number in range(1, len(few.scenes) + 1)]
    answers = (*few.answers[:-1], "")
    examples = zip(images, few.prompts, answers, strict=True)
    parts = [part for image, prompt, answer in examples for part in (Medium(image), Text(prompt + answer))]
    record = {"id": name, "kind": "few-shot", "prompt": format_prompt(parts), "completion": few.answers[-1]}
    return Item(record, dict(zip(images, few.scenes, strict=True)), few.num_things)


def _single(rng: Random, image: str, split: Split) -> tuple[Scene, dict[str, Any]]:
    """A caption, or a question whose kind is drawn before the scene, so that all kinds are asked as often."""
    if rng.random() < CAPTIONS:
        scene = sample_scene(rng, split)
        kind, turn = f"caption-{len(scene.things)}", _caption_turn(rng, scene)
    else:
        scene, question = _any_scene(rng, rng.choice(QUESTION_KINDS), split)
        kind, turn = question.kind, _question_turn(rng, question)
    return scene, {"kind": kind, "prompt": format_prompt([Medium(image), Text(turn["prompt"])]), **_completion(turn)}


def _any_scene(rng: Random, kind: str, split: Split) -> tuple[Scene, Question]:
    while True:
        scene = sample_scene(rng, split)
        if question := ask(rng, scene, kind, split):
            return scene, question


def _turns(rng: Random, image: str, split: Split) -> tuple[Scene, dict[str, Any]]:
    """A first turn worded as a single prompt is, so that each kind is met as it will be asked; then others."""
    scene = sample_scene(rng, split)
    caption_first = rng.random() < CAPTION_FIRST
    number = QUESTIONS_AFTER_CAPTION if caption_first else QUESTIONS
    turns = [_question_turn(rng, question) for question in _different(ask_about(rng, scene, split), number)]
    turns.insert(0 if caption_first else number, _caption_turn(rng, scene))
    later = [{"prompt": " " + turn["prompt"], **_completion(turn)} for turn in turns[1:]]
    return scene, {"prompt": format_prompt([Medium(image)]), "turns": [turns[0], *later]}


def _caption_turn(rng: Random, scene: Scene) -> dict[str, str]:
    return {"prompt": caption_prompt(rng), "completion": caption(scene)}


def _question_turn(rng: Random, question: Question) -> dict[str, str]:
    return {"prompt": question_prompt(rng, question), "completion": question.answer}


def _completion(turn: dict[str, str]) -> dict[str, str]:
    return {"completion": turn["completion"]}


def _different(questions: Iterator[Question], number: int) -> list[Question]:
    """The first `number` questions that are not the same."""
    found: dict[Question, None] = {}
    while len(found) < number:
        found[next(questions)] = None
    return list(found)


def _with_wrong_image(item: Item, rng: Random, split: Split) -> Item:
    *_, asked = item.scenes
    return replace(item, scenes=item.scenes | {asked: sample_scene(rng, split, item.num_things)})
