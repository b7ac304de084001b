"""The rows of FineVision and of The Cauldron: pictures, and pairs of a question and an answer about them.

    {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}, …]}

All pictures stand before the first question. The format has no placeholder: `<image>` in a text is text.
Sources: https://huggingface.co/datasets/HuggingFaceM4/the_cauldron,
https://huggingface.co/datasets/HuggingFaceM4/FineVision, and `data/datasets.py` of https://github.com/huggingface/nanoVLM.
"""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.format import Format, read_id, read_kind
from vlm_cli.data.formats.pictures import read_media_beside
from vlm_cli.data.formats.turns import Turn, pair_turns, place_media, read_system
from vlm_cli.data.jsonl import RecordError, describe_type, get_field
from vlm_cli.data.record import Content
from vlm_cli.prompt import KINDS, Text

__all__ = ["Texts"]


class Texts(Format):
    """Pictures, and pairs of a question and an answer."""

    name = "texts of FineVision"
    keys = '"texts" of "user" and "assistant", with "images"'

    def matches(self, data: dict[str, Any]) -> bool:
        return data.get("texts") is not None

    def read(self, data: dict[str, Any]) -> Content:
        pairs = get_field(data, "texts", list, "a list of pairs")
        turns = [turn for number, pair in enumerate(pairs, start=1) for turn in _read_pair(pair, number)]
        system, turns = read_system(data, turns)
        media = {kind: read_media_beside(data, kind) for kind in KINDS}
        has_tag = any("<image>" in part.text for turn in turns for part in turn.parts if isinstance(part, Text))
        notes = ("has <image> in a text, which is read as text: all pictures come first",) if has_tag else ()
        segments = pair_turns(place_media(turns, media), "texts")
        return Content(segments, system, read_id(data), read_kind(data), notes, is_turns=True)


def _read_pair(pair: Any, number: int) -> list[Turn]:
    if not isinstance(pair, dict):
        raise RecordError(f"pair {number} must be an object, got {describe_type(pair)}.")
    question, answer = pair.get("user"), pair.get("assistant")
    if question is not None and not isinstance(question, str):
        raise RecordError(f'pair {number}: "user" must be text, got {describe_type(question)}.')
    if not isinstance(answer, str):
        raise RecordError(f'pair {number}: "assistant" must be text, got {describe_type(answer)}.')
    asked = (Text(question),) if question else ()
    return [Turn("user", asked, 2 * number - 1), Turn("assistant", (Text(answer),), 2 * number)]
