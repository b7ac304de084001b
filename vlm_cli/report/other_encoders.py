"""Names of vision encoders beside OpenCLIP's: types of vision models of Transformers, and models of timm with tags.

`other_encoders.json` brings them, so that to list them imports neither library; `docs/generate_encoders.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_cli.plain_data import read_json

__all__ = ["OtherEncoder", "find_other_encoders", "write_other_encoders"]

_TABLE = Path(__file__).with_name("other_encoders.json")


@dataclass(frozen=True)
class OtherEncoder:
    """What is known of an encoder by its name.

    Attributes:
        summary: what it is, and what to write.
        pretrained: tags of its weights.
    """

    summary: str
    pretrained: tuple[str, ...] = ()


def find_other_encoders(word: str) -> dict[str, OtherEncoder]:
    """Return the encoders whose names contain a word; none for an empty word, since there are more than a thousand.

    Args:
        word: part of `hf:TYPE` or `timm:NAME`.
    """
    if not word:
        return {}
    table = read_json(_TABLE)
    found = {f"hf:{kind}": OtherEncoder(f"Transformers {name}: hf:ORG/NAME") for kind, name in table["hf"].items()}
    found |= {f"timm:{name}": OtherEncoder("timm", tuple(tags)) for name, tags in table["timm"].items()}
    return {name: x for name, x in found.items() if word.lower() in name.lower()}


def write_other_encoders(types: Mapping[str, str], models: Mapping[str, Sequence[str]]) -> None:
    """Replace the table that vlm brings.

    Args:
        types: type of Transformers -> its class.
        models: name of timm -> tags of its weights.
    """
    parts = []
    for name, entries in (("hf", types), ("timm", models)):
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(entries.items())]
        parts.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
    _TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
