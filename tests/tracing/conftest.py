"""Tiny models of any parts in memory, with their processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.support import disk, seed_torch
from tests.support.tiny import FUSIONS, TOKENIZERS, open_gates
from tests.support.traced import Subject
from vlm_cli.checkpoint.create import create, plan
from vlm_cli.composition import Composition

#: Settings of vision tokenizers, beside `TOKENIZERS`.
_OTHERS: dict[str, dict[str, Any]] = {
    "c-abstractor": {"type": "c-abstractor", "num_queries": 4, "depth": 1, "dim": 24},
    "latent-attention": {"type": "latent-attention", "num_latents": 3, "num_heads": 2},
}


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """`subject(tokenizer, fusion, language_model="llama", sections={…})`: the same model for the same settings.

    A tokenizer and a fusion are names of `TOKENIZERS` and `FUSIONS`; `sections` are laid over their settings.
    """
    folder = tmp_path_factory.mktemp("parts")
    tower = f"local-dir:{disk.tower(folder / 'tower')}"

    @cache
    def language_model(name: str) -> str:
        return str(disk.language_model(folder / name, name))

    @cache
    def make(tokenizer: str, fusion: str, name: str, sections: str) -> Subject:
        parts: dict[str, dict[str, Any]] = {
            "vision_encoder": {"name": tower},
            "vision_tokenizer": (TOKENIZERS | _OTHERS)[tokenizer],
            "fusion": FUSIONS[fusion],
            "language_model": {"name": language_model(name)},
        }
        for section, over in json.loads(sections).items():
            parts[section] = parts.get(section, {}) | over
        seed_torch(0)
        blueprint = plan(Composition.compose(None, parts))
        return Subject(open_gates(create(blueprint)).eval(), blueprint.processor)

    def find(tokenizer: str, fusion: str, name: str = "llama", sections: Any = None) -> Subject:
        return make(tokenizer, fusion, name, json.dumps(sections or {}, sort_keys=True))

    return find
