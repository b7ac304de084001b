"""Names of exchangeable parts, and what they stand for.

A registry holds import targets, not classes, so that listing names and checking a composition
needs no torch. Other packages add parts through the entry-point groups named below; the built-in
parts are registered in the same terms.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from vlm_cli.errors import UnknownNameError

__all__ = ["FUSIONS", "VISION_TOKENIZERS", "Part", "Registry", "suggest"]


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the nearest known name, or an empty string.

    >>> suggest("percever", ["perceiver", "linear"])
    " Did you mean 'perceiver'?"
    """
    choices = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    return f" Did you mean {choices[near[0]]!r}?" if near else ""


@dataclass(frozen=True)
class Part:
    """One registered part: `target` and `options` are `module:attribute` import strings.

    `options` names the frozen dataclass of the part's settings, importable without torch.
    """

    name: str
    target: str
    options: str
    summary: str

    def load(self) -> Any:
        """The class that implements the part."""
        return _import(self.target)

    def options_class(self) -> Any:
        """The dataclass of the part's settings."""
        return _import(self.options)


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


class Registry:
    """A dictionary of parts that refuses a second owner of a name and suggests the nearest one.

    Args:
        kind: what it holds, in words, for messages ("vision tokenizer").
        group: entry-point group; each entry point there loads to a `Part`.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._built_in: dict[str, Part] = {}

    def add(self, part: Part) -> None:
        """Register a part.

        Raises:
            ValueError: if the name is taken.
        """
        if part.name in self._parts:
            raise ValueError(f"{self.kind} {part.name!r} is already registered.")
        self._built_in[part.name] = part
        self.__dict__.pop("_parts", None)

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """Built-in parts, then those of installed packages."""
        parts = dict(self._built_in)
        for point in entry_points(group=self.group):
            part = point.load()
            if part.name in parts:
                raise ValueError(f"{point.value} registers {self.kind} {part.name!r}, which is taken.")
            parts[part.name] = part
        return parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Part:
        try:
            return self._parts[name]
        except KeyError:
            raise UnknownNameError(self.unknown(name)) from None

    def unknown(self, name: str) -> str:
        """The message for a name that is not here."""
        return (
            f"unknown {self.kind} {name!r}.{suggest(name, self)} "
            f"Known: {', '.join(sorted(self))}. Run `vlm list {self.kind.replace(' ', '-')}s` to see them described."
        )


VISION_TOKENIZERS = Registry("vision tokenizer", "vlm_cli.vision_tokenizers")
FUSIONS = Registry("fusion", "vlm_cli.fusions")

_TOKENIZERS = "vlm_cli.modeling.vision_tokenizers"
for _part in (
    Part(
        "perceiver",
        f"{_TOKENIZERS}.perceiver:PerceiverResampler",
        "vlm_cli.composition:PerceiverOptions",
        "Perceiver Resampler: a few learned latents read all patches and frames (Flamingo)",
    ),
    Part(
        "qformer",
        f"{_TOKENIZERS}.qformer:QFormer",
        "vlm_cli.composition:QFormerOptions",
        "Q-Former: learned queries in a BERT that cross-attends to the patches (BLIP-2)",
    ),
    Part(
        "linear",
        f"{_TOKENIZERS}.linear:LinearProjection",
        "vlm_cli.composition:LinearOptions",
        "one linear map of each patch (LLaVA)",
    ),
    Part(
        "mlp",
        f"{_TOKENIZERS}.linear:MLPProjection",
        "vlm_cli.composition:MLPOptions",
        "two linear maps with a GELU between, for each patch (LLaVA-1.5)",
    ),
):
    VISION_TOKENIZERS.add(_part)

for _part in (
    Part(
        "cross-attention",
        "vlm_cli.modeling.vlm:VLMWithCrossAttention",
        "vlm_cli.composition:CrossAttentionOptions",
        "gated cross-attention blocks before decoder layers read the vision tokens (Flamingo)",
    ),
    Part(
        "language-stream",
        "vlm_cli.modeling.vlm:VLMWithLanguageStream",
        "vlm_cli.composition:LanguageStreamOptions",
        "vision tokens take the place of the media token among the text tokens (Kosmos, BLIP-2, LLaVA)",
    ),
):
    FUSIONS.add(_part)
