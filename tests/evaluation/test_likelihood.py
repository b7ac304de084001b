"""Log-probabilities of choices: those of `forward` on each choice alone, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT
from tests.support.grid import first_of
from tests.support.questions import PROMPTS, Write
from vlm_cli.checkpoint.directory import load
from vlm_cli.cli.sampling import SamplingOptions
from vlm_cli.evaluation.items import Item, encode_items, read_items
from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.likelihood import LikelihoodScorer
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.media import MediaLoader
from vlm_cli.models import load as load_model
from vlm_cli.prompt import Medium, Text

CHOICES = (" red", " a lime and white circle", " x")


def slow(item: Item, text: str, plan: GenerationPlan, folder: Path) -> tuple[float, int]:
    """One continuation alone: pixels and tokens through `forward`."""
    parts = [*item.prompt, Text(text)]
    both = plan.processor.encode(parts)
    assert both[: len(item.ids)] == item.ids
    images = [MediaLoader(folder).load(part.source) for part in parts if isinstance(part, Medium)]
    pixels = torch.stack([plan.processor.image_processor.read(x).views for x in images])[None]
    prefix = torch.tensor([[i < len(item.ids) for i in range(len(both))]])
    with torch.inference_mode():
        logits = plan.model(vision_x=pixels, lang_x=torch.tensor([both]), prefix_mask=prefix).logits[0].log_softmax(-1)
    new = both[len(item.ids) :]
    return sum(logits[len(item.ids) + i - 1, token].item() for i, token in enumerate(new)), len(new)


@pytest.mark.parametrize("fusion", first_of(["stream", "attention"]))
def test_likelihoods_are_those_of_each_choice_alone(
    fusion: str, folder: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load(str(folder / fusion))
    plan = GenerationPlan(model, processor, SamplingOptions(max_new_tokens=6).keywords())
    items, records = read_items(write([{"prompt": prompt, "completion": " x"} for _, prompt in PROMPTS]))
    encode_items(items, records, plan)
    scorer = LikelihoodScorer(plan, BatchSize(4))
    rated, original = [], scorer._rate
    monkeypatch.setattr(scorer, "_rate", lambda tasks: (rated.extend(tasks), original(tasks)))
    found = scorer.score(items, [CHOICES] * len(items), MediaLoader(folder))
    assert len(rated) == len(CHOICES) * len(items) and not any(task.row.images for task in rated)
    for item, of_item in zip(items, found, strict=True):
        for text, likelihood in zip(CHOICES, of_item, strict=True):
            value, length = slow(item, text, plan, folder)
            assert likelihood.log_probability == pytest.approx(value, abs=1e-4)
            assert likelihood.num_tokens == length
    values = [x.log_probability for of_item in found for x in of_item]
    assert len({round(x, 3) for x in values}) > len(values) // 2, "all alike, so that order would not show"
    assert scorer.media.encoded == 4  # each picture once


def test_what_the_model_writes_is_greedy(write: Write) -> None:
    model, processor = load_model("demo")
    plan = GenerationPlan(model, processor, SamplingOptions(max_new_tokens=4).keywords())
    picture, loader = ROOT / "examples" / "images" / "one.png", MediaLoader()
    items, records = read_items(write([{"prompt": f"<image:{picture}>Describe the image.", "completion": "x"}]))
    encode_items(items, records, plan)
    own, other = LikelihoodScorer(plan, BatchSize(4)).score(items, [[" a small green", " a large green"]], loader)[0]
    assert own.is_greedy and not other.is_greedy and own.log_probability > other.log_probability


def test_a_picture_that_cannot_be_read(folder: Path, write: Write) -> None:
    (folder / "half.png").write_bytes((folder / "red.png").read_bytes()[:-30])
    model, processor = load(str(folder / "stream"))
    plan = GenerationPlan(model, processor, SamplingOptions(max_new_tokens=4).keywords())
    rows: list[Any] = [{"prompt": f"<image:{x}.png>Q:", "completion": "x"} for x in ("half", "red")]
    items, records = read_items(write(rows))
    encode_items(items, records, plan)
    found = LikelihoodScorer(plan, BatchSize(4)).score(items, [["a", "b"]] * 2, MediaLoader(folder))
    assert [len(x) for x in found] == [0, 2]
    assert "'half.png' is damaged or cut short" in str(items[0].error) and items[1].error is None
