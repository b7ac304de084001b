"""Benchmarks whose answers are a few words: VQAv2, TextVQA, GQA, DocVQA, ChartQA.

The prompt is the question, and then SHORT.
"""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.benchmarks.benchmark import (
    SHORT,
    Benchmark,
    Question,
    most_common,
    picture_name,
    pictures_of,
    question_of,
    text_of,
    texts_of,
)
from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.prompt import Medium, Text

__all__ = ["GQA", "VQAV2", "ChartQA", "DocVQA", "TextVQA"]


# Who asks about a chart, as tables of ChartQA write it.
_CHARTS_OF = {"0": "human", "1": "machine", "human_test": "human", "augmented_test": "machine"}


def _parts(pictures: tuple[Medium, ...], question: str) -> tuple[Text | Medium, ...]:
    return (*pictures, Text(f"{question}{SHORT}"))


class VQAV2(Benchmark):
    """VQAv2: questions with ten answers each. Pictures are COCO's, `COCO_val2014_000000000042.jpg`.

    Of the two files, either may be named; the other stands beside it. A table has both in each row.
    """

    name = "VQAv2"
    keys = '"question" with "question_type", "answer_type" and "answers"'
    metric = "vqa"
    site = "https://visualqa.org/download.html"

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "question_type", "answer_type", "image_id"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        given = data.get("answers") or []  # null in test splits
        if not isinstance(given, list) or not all(
            isinstance(x, dict) and isinstance(x.get("answer"), str) for x in given
        ):
            raise RecordError(f'"answers" must be a list of objects with an "answer", got {describe_type(given)}.')
        answers = tuple(str(x["answer"]) for x in given)
        pictures = pictures_of(data, name=text_of(data, "file_name"))
        return Question(
            _parts(pictures, question_of(data)),
            text_of(data, "multiple_choice_answer") or most_common(answers),
            answers,
            id=text_of(data, "question_id") or None,
            kind=text_of(data, "answer_type") or None,
            group=picture_name(data, "image_id"),
        )


class TextVQA(Benchmark):
    """TextVQA: questions about words in pictures, with ten answers each. Pictures are `IMAGE_ID.jpg`."""

    name = "TextVQA"
    keys = '"question" with "image_id" and "image_classes"'
    metric = "vqa"
    site = "https://textvqa.org/dataset/"

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "image_id"} <= data.keys() and not {"image_classes", "question_tokens"}.isdisjoint(data)

    def ask(self, data: dict[str, Any]) -> Question:
        answers = texts_of(data, "answers")
        pictures = pictures_of(data, name=f"{text_of(data, 'image_id')}.jpg")
        identity = text_of(data, "question_id") or None
        group = picture_name(data, "image_id")
        return Question(_parts(pictures, question_of(data)), most_common(answers), answers, id=identity, group=group)


class GQA(Benchmark):
    """GQA: questions made from scene graphs, with one answer each. Pictures are `IMAGE_ID.jpg`."""

    name = "GQA"
    keys = '"question" with "imageId"'
    metric = "normalised"
    site = "https://cs.stanford.edu/people/dorarad/gqa/download.html"

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "imageId"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        pictures = pictures_of(data, name=f"{text_of(data, 'imageId')}.jpg")
        types = data.get("types")
        kind = text_of(types, "structural") if isinstance(types, dict) else ""
        return Question(
            _parts(pictures, question_of(data)),
            text_of(data, "answer"),
            id=text_of(data, "id", "question_id") or None,
            kind=kind or None,
            group=picture_name(data, "imageId"),
        )


class DocVQA(Benchmark):
    """DocVQA: questions about scanned pages, with one or several answers. Pictures are those of "image"."""

    name = "DocVQA"
    keys = '"question" with "questionId" and "docId"'
    metric = "anls"
    site = "https://www.docvqa.org/datasets/docvqa"

    def matches(self, data: dict[str, Any]) -> bool:
        return {"question", "questionId", "docId"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        answers = texts_of(data, "answers")
        kinds = texts_of(data, "question_types")
        return Question(
            _parts(pictures_of(data), question_of(data)),
            answers[0] if answers else "",
            answers,
            id=text_of(data, "questionId") or None,
            kind=kinds[0] if kinds else None,
            group=picture_name(data, "docId"),
        )


class ChartQA(Benchmark):
    """ChartQA: questions about charts, with one answer each. Pictures are those of "imgname"."""

    name = "ChartQA"
    keys = '"query" with "label", and "imgname" or "image"; or "question" with "type" human_test or augmented_test'
    metric = "relaxed"
    site = "https://github.com/vis-nlp/ChartQA"

    def matches(self, data: dict[str, Any]) -> bool:
        if {"question", "answer", "type", "image"} <= data.keys():
            return str(data["type"]) in _CHARTS_OF
        return {"query", "label"} <= data.keys() and not {"imgname", "image"}.isdisjoint(data)

    def ask(self, data: dict[str, Any]) -> Question:
        query, right = ("query", "label") if "query" in data else ("question", "answer")
        answers = texts_of(data, right) if isinstance(data.get(right), list) else (text_of(data, right),)
        pictures = pictures_of(data, name=text_of(data, "imgname"))
        kind = text_of(data, "human_or_machine", "type")
        return Question(
            _parts(pictures, question_of(data, query)),
            answers[0] if answers else "",
            answers,
            kind=_CHARTS_OF.get(kind, kind) or None,
            group=picture_name(data, "imgname", "image"),
        )
