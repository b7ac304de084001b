"""Builds of a published checkpoint in which other parts replace its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.support import disk
from vlm_cli.checkpoint.published.importing import Imported, import_checkpoint
from vlm_cli.composition import PARTS, CompositionRequest
from vlm_cli.modeling.vlm import VLM

__all__ = ["check_swap", "other_parts"]


@torch.no_grad()
def check_swap(
    source: Path,
    new: set[str],
    options: CompositionRequest | None = None,
    *,
    sizes: Sequence[str] = (),
    **flags: str,
) -> Imported:
    """Import a checkpoint with other parts; compare what is kept, bit for bit, and account for every tensor.

    Args:
        source: the checkpoint.
        new: the parts that start anew, of those that have tensors.
        options: that the checkpoint needs in any case; None for none.
        sizes: settings of the new parts.
        flags: the parts that replace its own, as `CompositionRequest` takes them.
    """
    options = options or CompositionRequest()
    changed: Any = {**flags, "overrides": (*options.overrides, *sizes)}
    own = import_checkpoint(source, composition_over=options.compose_over)
    found = import_checkpoint(source, composition_over=replace(options, **changed).compose_over)
    report, model = found.report, found.model
    assert own.model is not None and model is not None, report
    state, before = model.state_dict(), own.model.state_dict()
    parts = {part: [x for x in state if x.startswith(VLM.PART_PREFIXES[part])] for part in PARTS}
    assert {part for part, names in parts.items() if names and names[0] in report.new} == new
    assert set(report.new) == {x for part in new for x in parts[part]}
    assert {*report.loaded, *report.absent, *report.new} == state.keys() and not report.missing
    for part, names in parts.items():
        for name in names if part not in new else ():
            assert torch.equal(state[name], before[name]), name
        told = [note for note in found.notes if note.startswith(f"{part}: {len(names)} tensor")]
        assert not names or ["kept" if "kept" in note else "new" for note in told] == ["new" if part in new else "kept"]
    assert all(x.isfinite().all() for x in state.values())
    inputs = found.processor(text="<image>w1", images=[Image.new("RGB", (50, 40), "red")])
    logits = model(**inputs).logits
    assert logits.isfinite().all() and logits.shape[-1] == model.config.first_added_id + len(model.config.added_tokens)
    return found


def other_parts(folder: Path) -> dict[str, str]:
    """Write a language model and a vision encoder that no checkpoint of the tests has."""
    return {
        "language_model": str(disk.language_model(folder / "other-lm")),
        "vision_encoder": f"local-dir:{disk.tower(folder / 'other-tower')}",
    }
