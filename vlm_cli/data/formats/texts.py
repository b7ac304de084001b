"""The rows of FineVision and of The Cauldron: pictures, and pairs of a question and an answer about them.

    {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}, …]}

All pictures stand before the first question. The format has no placeholder: `<image>` in a text is text.
Sources: https://huggingface.co/datasets/HuggingFaceM4/the_cauldron,
https://huggingface.co/datasets/HuggingFaceM4/FineVision, and `data/datasets.py` of https://github.com/huggingface/nanoVLM.
"""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.format import TurnFormat
from vlm_cli.data.formats.pictures import read_media_beside
from vlm_cli.data.formats.turns import Turn, place_media, read_system
from vlm_cli.data.jsonl import RecordError, describe_type, get_field
from vlm_cli.prompt import KINDS, Text

__all__ = ["Texts"]


class Texts(TurnFormat):
    """Pictures, and pairs of a question and an answer."""

    name = "texts of FineVision"
    key = "texts"
    keys = '"texts" of "user" and "assistant", with "images"'

    def matches(self, data: dict[str, Any]) -> bool:
        return data.get("texts") is not None

    def read_turns(self, data: dict[str, Any]) -> tuple[str | None, list[Turn], tuple[str, ...]]:
        pairs = get_field(data, "texts", list, "a list of pairs")
        turns = [turn for i, pair in enumerate(pairs, start=1) for turn in _read_pair(pair, i, is_last=i == len(pairs))]
        system, turns = read_system(data, turns)
        media = {kind: read_media_beside(data, kind) for kind in KINDS}
        has_tag = any("<image>" in part.text for turn in turns for part in turn.parts if isinstance(part, Text))
        notes = ("has <image> in a text, which is read as text: all pictures come first",) if has_tag else ()
        return system, place_media(turns, media), notes


def _read_pair(pair: Any, number: int, *, is_last: bool) -> list[Turn]:
    """Return a question and its answer, which the last pair may lack."""
    if not isinstance(pair, dict):
        raise RecordError(f"pair {number} must be an object, got {describe_type(pair)}.")
    if "user" not in pair:  # null is a picture with its caption
        raise RecordError(f'pair {number} has no "user". It has: {", ".join(map(repr, pair)) or "nothing"}.')
    question, answer = pair["user"], pair.get("assistant")
    if question is not None and not isinstance(question, str):
        raise RecordError(f'pair {number}: "user" must be text, got {describe_type(question)}.')
    asked = Turn("user", (Text(question),) if question else (), 2 * number - 1)
    if is_last and answer is None:
        return [asked]
    if not isinstance(answer, str):
        raise RecordError(f'pair {number}: "assistant" must be text, got {describe_type(answer)}.')
    return [asked, Turn("assistant", (Text(answer),), 2 * number)]
