"""What a user asks for on the way to a composition: a family, a file, single parts and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlm_cli.composition.composition import Composition
from vlm_cli.composition.files import keep_trained_settings, read_file, split_name
from vlm_cli.composition.options import PARTS
from vlm_cli.errors import CompositionError

__all__ = ["CompositionRequest"]


@dataclass(frozen=True, kw_only=True)
class CompositionRequest:
    """A family, covered with a composition file, covered with single parts, covered with overrides.

    All are optional. The composition flags of `vlm build`, `vlm inspect` and others have the same names.

        CompositionRequest(family="flamingo", language_model="./my-llama").compose()
    """

    family: str | None = None
    config: Path | None = None  # composition file, YAML or JSON
    vision_encoder: str | None = None  # NAME[:TAG]
    vision_tokenizer: str | None = None
    fusion: str | None = None
    language_model: str | None = None
    revision: str | None = None  # branch, tag or commit of a hub id
    trainable: str | None = None  # parts, separated by commas
    overrides: Sequence[str] = ()  # texts like "vision_tokenizer.num_latents=32"

    @property
    def flags(self) -> list[str]:
        """The command-line flags of what is set, the revision left out."""
        names = [f.name for f in fields(self) if f.name != "revision" and getattr(self, f.name)]
        return ["--set" if name == "overrides" else f"--{name.replace('_', '-')}" for name in names]

    def compose(self, *layers: Mapping[str, Any]) -> Composition:
        """Make the composition; `layers` are plain data that cover the family and that the request covers.

        Raises:
            CompositionError: with all problems at once.
        """
        parts = self._parts()
        if self.revision is not None:
            parts["language_model"] = {**parts.get("language_model", {}), "revision": self.revision}
        return Composition.compose(self.family, *layers, *self._file(), parts, overrides=self.overrides)

    def compose_over(self, found: Mapping[str, Any]) -> Composition:
        """Cover the composition that a published checkpoint describes with the request.

        The revision is that of the checkpoint, so that no part gets it.

        Raises:
            CompositionError: with all problems at once.
        """
        parts = keep_trained_settings(found, self._parts())
        return Composition.compose(self.family, found, *self._file(), parts, overrides=self.overrides)

    def _file(self) -> list[dict[str, Any]]:
        return [] if self.config is None else [read_file(self.config)]

    def _parts(self) -> dict[str, Any]:
        """Return the single parts as a layer."""
        parts: dict[str, Any] = {
            name: value for name in ("vision_tokenizer", "fusion") if (value := getattr(self, name)) is not None
        }
        if self.vision_encoder is not None:
            parts["vision_encoder"] = split_name(self.vision_encoder)
        if self.language_model is not None:
            parts["language_model"] = {"name": self.language_model}
        if self.trainable is not None:
            parts["trainable"] = [x.strip().replace("-", "_") for x in self.trainable.split(",") if x.strip()]
            if not parts["trainable"]:
                raise CompositionError(f"--trainable names no part. Known: {', '.join(PARTS)}.")
        return parts
