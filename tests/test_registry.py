"""Registries of parts, and the nearest name."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint

import pytest

import vlm_cli.registry
from vlm_cli.errors import UnknownNameError
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS, Part, Registry, suggest

PART = Part("square", "math:sqrt", "vlm_cli.composition:LinearOptions", "a part of another package")


@pytest.mark.parametrize("registry", [VISION_TOKENIZERS, FUSIONS], ids=lambda registry: registry.kind)
def test_parts_can_be_loaded(registry):
    for name in registry:
        part = registry[name]
        assert part.name == name and part.summary and isinstance(part.load(), type)
        assert dataclasses.is_dataclass(part.options_class())


def test_a_name_has_one_owner():
    registry = Registry("shape", "no.such.group")
    registry.add(PART)
    assert list(registry) == ["square"] and "square" in registry and registry["square"] is PART
    with pytest.raises(ValueError, match="shape 'square' is already registered"):
        registry.add(PART)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        VISION_TOKENIZERS["percever"]
    message = str(caught.value)
    assert "unknown vision tokenizer 'percever'. Did you mean 'perceiver'? Known: linear, mlp" in message
    assert "vlm list vision-tokenizers" in message


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("VIT-b-32", "ViT-B-32"), ("ViT-B32", "ViT-B-32"), ("perceiver", ""), ("", ""), ("zzz", "")],
)
def test_suggestions(name, wanted):
    found = suggest(name, ["ViT-B-32", "ViT-L-14", "RN50"])
    assert found == (f" Did you mean {wanted!r}?" if wanted else "")


def entry_points(*points):
    return lambda group: [point for point in points if point.group == group]


def test_other_packages_add_parts(monkeypatch):
    point = EntryPoint("square", "test_registry:PART", "shapes")
    monkeypatch.setattr(vlm_cli.registry, "entry_points", entry_points(point))
    registry = Registry("shape", "shapes")
    assert list(registry) == ["square"] and registry["square"].load()(9) == 3
    assert list(Registry("shape", "other")) == []


def test_other_packages_may_not_take_a_name(monkeypatch):
    point = EntryPoint("square", "test_registry:PART", "shapes")
    monkeypatch.setattr(vlm_cli.registry, "entry_points", entry_points(point))
    registry = Registry("shape", "shapes")
    registry._built_in["square"] = PART
    with pytest.raises(ValueError, match="registers shape 'square', which is taken"):
        list(registry)
