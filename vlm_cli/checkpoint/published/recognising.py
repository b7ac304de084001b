"""Recognise the layout of a published checkpoint, and describe the checkpoint in vlm's terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts import LAYOUTS
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Layout
from vlm_cli.checkpoint.published.layouts.own import OwnDirectory
from vlm_cli.errors import CheckpointError, VLMError, explain_reading

__all__ = ["RecognisedCheckpoint", "recognise"]


@dataclass(frozen=True)
class RecognisedCheckpoint:
    """A published checkpoint whose layout is known.

    Attributes:
        checkpoint: its files.
        layout: how its tensors are named.
    """

    checkpoint: PublishedCheckpoint
    layout: Layout

    @cached_property
    def description(self) -> CheckpointDescription:
        """The checkpoint in vlm's terms.

        Raises:
            CheckpointError: if vlm cannot build what the checkpoint needs.
        """
        with self.blaming_config():
            return self.layout.describe(self.checkpoint)

    @property
    def holds_all_backbones(self) -> bool:
        """Whether both backbones' weights are in the checkpoint, and nowhere else that it names."""
        found = self.description
        is_own_lm = (
            found.text_config is not None and found.composition["language_model"]["name"] == self.checkpoint.name
        )
        is_own_tower = found.vision_config is not None and not found.composition["vision_encoder"].get("pretrained")
        return is_own_lm and is_own_tower

    @contextmanager
    def blaming_config(self) -> Iterator[None]:
        """Turn any error inside the block into a CheckpointError that names the checkpoint and its layout."""
        try:
            yield
        except VLMError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"cannot make a model of the configuration of {self.checkpoint.name!r}, which is read as "
                f"{self.layout.name}: {explain_reading(error)}. If you changed its "
                "config.json, restore the published file."
            ) from error


def recognise(source: PublishedCheckpoint | str | Path, *, revision: str | None = None) -> RecognisedCheckpoint:
    """Find the layout whose names and shapes a checkpoint has; no tensor is read.

    Args:
        source: a checkpoint, or its file, directory or hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: if there is no such checkpoint, it is damaged, or its layout is unknown.
    """
    if isinstance(source, PublishedCheckpoint):
        checkpoint = source
    else:
        checkpoint = PublishedCheckpoint.open(str(source), revision=revision)
    for layout in (*LAYOUTS, OwnDirectory()):
        if layout.matches(checkpoint):
            return RecognisedCheckpoint(checkpoint, layout)
    names = sorted(checkpoint.tensors)
    shown = ", ".join(names[:: max(1, len(names) // 4)][:4])
    raise CheckpointError(
        f"{checkpoint.name!r} has no layout that vlm knows. Its {len(names)} tensors are called {shown}, …. Known: "
        f"{', '.join(layout.name for layout in LAYOUTS)}. To load weights that vlm trained over a composition: "
        "--weights FILE."
    )
