"""Tiny checkpoints of models that cut pictures into tiles, against the model and the processor that wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.photographs import PHOTOGRAPHS, photograph
from tests.support.published import VOCABULARY, tell
from tests.support.tiny import nudged
from vlm_cli.checkpoint.published.importing import Imported, import_checkpoint
from vlm_cli.modeling.budget import ContextBudget

__all__ = ["TiledCase", "check_tiled"]

BEFORE, AFTER = "w5 w6", "w7 w8 w9"


@dataclass(frozen=True, kw_only=True)
class TiledCase:
    """One tiny checkpoint.

    Attributes:
        source: directory that `--from` gets.
        model: of Transformers.
        processor: of Transformers, with the Pillow backend of its image processor.
        placeholder: what its prompts write for a picture.
        takes_token_types: whether its masks are made of `token_type_ids`.
        over: settings over the checkpoint's composition.
        unused: how many tensors of the checkpoint a VLM does not have.
    """

    source: Path
    model: PreTrainedModel
    processor: Any
    placeholder: str = "<image>"
    takes_token_types: bool = False
    over: Mapping[str, Any] | None = None
    unused: int = 0

    @property
    def made_by(self) -> str:
        return f"Transformers' {type(self.model).__name__}"

    def read(self, shape: str) -> dict[str, Tensor]:
        """What Transformers' processor makes of a prompt with one photograph."""
        text = f"{BEFORE} {self.placeholder} {AFTER}"
        found = self.processor(text=text, images=[photograph(shape)], return_tensors="pt")
        dropped = {"labels", "mm_token_type_ids", *([] if self.takes_token_types else ["token_type_ids"])}
        return {key: x for key, x in found.items() if key not in dropped}


@torch.no_grad()
def check_tiled(case: TiledCase, shapes: Sequence[str] = tuple(PHOTOGRAPHS), *, is_told: bool = False) -> Imported:
    """Import a checkpoint, and compare pixels, positions, logits and greedy tokens for photographs of many shapes.

    Args:
        case: the checkpoint.
        shapes: of the photographs.
        is_told: whether docs/checkpoints.md has a row for it.
    """
    imported = import_checkpoint(case.source, composition_over=case.over)
    model, report = imported.model, imported.report
    assert model is not None, report
    assert len(report.unused) == case.unused, report.unused
    images = imported.processor.image_processor
    added = [*range(VOCABULARY, model.config.first_added_id + model.added_tokens.num_tokens)]
    for shape in shapes:
        theirs, picture = case.read(shape), photograph(shape)
        ours = imported.processor(text=f"{BEFORE} <image> {AFTER}", images=[picture])
        pixels, views = theirs["pixel_values"].flatten(0, -4), ours["pixel_values"][0, 0]
        torch.testing.assert_close(views, pixels[: len(views)], atol=2e-6, rtol=0)
        assert not pixels[len(views) :].any()  # Mllama pads
        size = images.measure(*picture.size)
        positions = ContextBudget.of(model).positions(ours["input_ids"].shape[1], [size])
        assert positions == theirs["input_ids"].shape[1]
        last = [0, 1, -4, -3, -2, -1]  # positions of the words, and of the end of the picture
        expected = case.model(**theirs).logits[0, last, :VOCABULARY]
        found = model(**ours).logits[0, :, :VOCABULARY]
        assert float((found - expected).abs().max()) <= 1e-4, shape
        _see_that_it_matters(model, dict(ours), found)
        # The next word is chosen among words: added tokens have other ids there.
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        rows = [*range(VOCABULARY, case.model.get_output_embeddings().weight.shape[0])]
        answer = case.model.generate(**theirs, **options, suppress_tokens=rows or None)[0, -4:]
        assert torch.equal(model.generate(**ours, **options, suppress_tokens=added)[0, -4:], answer)
    if is_told:
        counts = [len(x) for x in (report.loaded, report.absent, report.unused)]
        tell(f"| {imported.layout.name} | {case.made_by} | {' | '.join(map(str, counts))} | ✓ | ✓ |")
    return imported


def _see_that_it_matters(model: Any, ours: dict[str, Tensor], found: Tensor) -> None:
    """Another order of the views, other pixels and another weight give other logits."""
    pixels = ours["pixel_values"]
    wrong = [ours | {"pixel_values": -pixels}]
    if pixels.shape[2] > 1:
        wrong.append(ours | {"pixel_values": pixels.roll(1, 2)})
    for inputs in wrong:
        assert float((model(**inputs).logits[0, :, :VOCABULARY] - found).abs().max()) > 1e-3
    with nudged(next(model.vision_tokenizer.parameters())):
        assert float((model(**ours).logits[0, :, :VOCABULARY] - found).abs().max()) > 1e-3
