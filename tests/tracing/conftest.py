"""Tiny models of any parts in memory, with their processors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.support import disk, seed_torch
from tests.support.tiny import open_gates
from tests.support.traced import Subject
from vlm_cli.checkpoint.create import create, plan


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """`subject(tokenizer, fusion, language_model="llama", **settings)`: the same model for the same names."""
    folder = tmp_path_factory.mktemp("parts")
    tower = f"local-dir:{disk.tower(folder / 'tower')}"

    @cache
    def language_model(name: str) -> str:
        return str(disk.language_model(folder / name, name))

    @cache
    def make(tokenizer: str, fusion: str, name: str = "llama", settings: tuple[Any, ...] = ()) -> Subject:
        seed_torch(0)
        blueprint = plan(disk.composition(tower, language_model(name), tokenizer, fusion, **dict(settings)))
        model = open_gates(create(blueprint)).eval()
        return Subject(model, blueprint.processor)

    def find(tokenizer: str, fusion: str, name: str = "llama", **settings: Any) -> Subject:
        return make(tokenizer, fusion, name, tuple(sorted(settings.items())))

    return find
