"""What the tasks `three_scenes` show, ask and count."""

from __future__ import annotations

from ast import literal_eval
from typing import Any

from PIL import Image

QUESTION = "Describe the image."


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the picture of a question."""
    with Image.open(doc["picture"]) as picture:
        return [picture.convert("RGB")]


def doc_to_text(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: Any = None,
    previous_output: list[str] | None = None,
    round_idx: int | None = None,
    previous_round_info: Any = None,
) -> Any:
    """Return the question of the first round, and of a later round the five values that lmms-eval wants to know."""
    if round_idx is None:
        return QUESTION
    return doc_to_visual(doc), QUESTION, round_idx >= 2, previous_output, previous_round_info


def process_rounds(doc: dict[str, Any], results: Any) -> dict[str, float]:
    """Count questions that are answered alike in both rounds, and right."""
    answers = [x.strip() for x in literal_eval(str(results[0]))]  # lmms-eval hands the answers on as one text
    return {"both_rounds": float(len(answers) == 2 and set(answers) == {doc["answer"]})}


def process_choices(doc: dict[str, Any], results: Any) -> dict[str, float]:
    """Count questions whose right choice has the least value."""
    values = [literal_eval(str(x))[0] for x in results]  # lmms-eval hands pairs on as texts
    return {"best_choice": float(values.index(min(values)) == doc["right"])}
