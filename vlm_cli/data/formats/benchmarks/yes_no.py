"""Benchmarks whose answers are yes or no: POPE, whose prompt is the question and then SHORT, and MME."""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.benchmarks.benchmark import (
    SHORT,
    Benchmark,
    Question,
    picture_name,
    pictures_of,
    question_of,
    text_of,
)
from vlm_cli.prompt import Text

__all__ = ["MME", "POPE"]

_SAMPLINGS = ("adversarial", "popular", "random")  # POPE's categories: how the things that are not there were chosen


def _is_pope(data: dict[str, Any]) -> bool:
    return str(data.get("category")).lower() in _SAMPLINGS


class POPE(Benchmark):
    """POPE: whether a thing is in a picture of COCO. JSON lines name the picture in "image"; a table holds it."""

    name = "POPE"
    keys = '"text" with "label" and "image", or "question" with "answer" and "image_source", or POPE\'s "category"'
    metric = "yes-no"
    site = "https://github.com/RUCAIBox/POPE"

    def matches(self, data: dict[str, Any]) -> bool:
        keys = data.keys()
        is_table = {"question", "answer", "image"} <= keys and _is_pope(data)
        return {"text", "label", "image"} <= keys or {"question", "answer", "image_source"} <= keys or is_table

    def ask(self, data: dict[str, Any]) -> Question:
        question = question_of(data, "text" if "text" in data else "question")
        pictures = pictures_of(data, name=f"{text_of(data, 'image_source')}.jpg")
        return Question(
            (*pictures, Text(f"{question}{SHORT}")),
            text_of(data, "label", "answer"),
            id=text_of(data, "question_id") or None,
            kind=text_of(data, "category") or None,
            group=picture_name(data, "image_source", "image"),
        )


class MME(Benchmark):
    """MME: two questions about each picture, of 14 tasks. They end with what to answer, so that SHORT is left out."""

    name = "MME"
    keys = '"question" that asks for yes or no, "answer", "category" and "image"'
    metric = "mme"
    site = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"

    def matches(self, data: dict[str, Any]) -> bool:
        if not {"question", "answer", "category", "image"} <= data.keys() or "image_source" in data or _is_pope(data):
            return False
        return "yes or no" in str(data["question"]).lower() and str(data["answer"]).strip().lower() in ("yes", "no")

    def ask(self, data: dict[str, Any]) -> Question:
        pictures, category = pictures_of(data), text_of(data, "category")
        picture = picture_name(data, "question_id", "image_path", "image") or pictures[0].source
        return Question(
            (*pictures, Text(question_of(data))),
            text_of(data, "answer"),
            id=text_of(data, "index") or None,
            kind=category or None,
            group=f"{category}/{picture}",
        )
