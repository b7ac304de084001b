"""Sections of a model card that vlm wrote, and how it knows whether somebody edited them.

    ---
    license: mit                          the metadata
    ---
    <!-- vlm:model 3fa9c1d20b7e -->       a section: vlm may write it anew while its text has this hash
    …
    <!-- /vlm:model -->
    Whatever a person adds stays as it is.

Text from files is escaped in a section, so that it holds no comment of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_cli.plain_data import parse_yaml

__all__ = ["Card", "sign_section"]

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(r"<!-- vlm:(\w+) ([0-9a-f]{12}) -->\n(.*?)\n<!-- /vlm:\1 -->", re.DOTALL)


def sign_section(name: str, text: str) -> str:
    """Write a section of a card."""
    text = text.strip("\n")
    return f"<!-- vlm:{name} {_hash(text)} -->\n{text}\n<!-- /vlm:{name} -->"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        metadata: between the lines `---` at its beginning.
        body: the rest.
    """

    metadata: Mapping[str, Any]
    body: str

    @classmethod
    def parse(cls, text: str) -> Card:
        """Read a card.

        Raises:
            ValueError: if its metadata is no YAML of plain data, or no mapping.
        """
        found = _FRONT.match(text)
        if found is None:
            return cls({}, text)
        data = parse_yaml(found[1]) or {}
        if not isinstance(data, dict):
            raise ValueError("the metadata between the lines --- is no mapping")
        return cls(data, text[found.end() :])

    @property
    def sections(self) -> dict[str, str]:
        """Each section that vlm wrote and nobody edited, whole."""
        return {name: whole for name, whole, is_intact in self._found() if is_intact}

    @property
    def edited(self) -> set[str]:
        """Names of sections that somebody edited."""
        return {name for name, _, is_intact in self._found() if not is_intact}

    @property
    def own_text(self) -> str:
        """What a person wrote: all but the sections."""
        text = self.body
        for section in self.sections.values():
            text = text.replace(section, "")
        return text.strip()

    def with_section(self, name: str, section: str) -> Card:
        """Return the card with a section in the place of the one of that name, or at its end; an edited one stays."""
        if name in self.edited:
            return self
        if (old := self.sections.get(name)) is not None:
            return Card(self.metadata, self.body.replace(old, section, 1))
        return Card(self.metadata, f"{self.body.rstrip()}\n\n{section}\n" if section else self.body)

    def _found(self) -> list[tuple[str, str, bool]]:
        return [(found[1], found[0], _hash(found[3]) == found[2]) for found in _SECTION.finditer(self.body)]
