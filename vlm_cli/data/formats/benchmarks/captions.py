"""Benchmarks of captions: COCO."""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.benchmarks.benchmark import Benchmark, Question, pictures_of, text_of, texts_of
from vlm_cli.prompt import Text

__all__ = ["COCOCaptions"]

_PROMPT = "Provide a one-sentence caption for the provided image."  # LLaVA-1.5, https://arxiv.org/abs/2310.03744


class COCOCaptions(Benchmark):
    """COCO captions: five for each picture. A question is a picture; the first caption is the one to learn."""

    name = "COCO captions"
    keys = '"images" with "annotations" that have a "caption"; of a table, "answer" with "coco_url"'
    metric = "cider"
    site = "https://cocodataset.org/#format-data"

    def matches(self, data: dict[str, Any]) -> bool:
        return {"file_name", "captions"} <= data.keys() or {"answer", "coco_url"} <= data.keys()

    def ask(self, data: dict[str, Any]) -> Question:
        captions = texts_of(data, "captions" if "captions" in data else "answer")
        pictures = pictures_of(data, name=text_of(data, "file_name"))
        first = captions[0] if captions else ""
        return Question((*pictures, Text(_PROMPT)), first, captions, id=text_of(data, "id", "question_id") or None)
