"""Registries of parts, and the nearest name."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint

import pytest

import vlm_cli.registry
from vlm_cli.composition import Composition
from vlm_cli.errors import PluginError, UnknownNameError
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS, Part, RegisteredPart, Registry, suggest

PART = RegisteredPart("square", "math:sqrt", "vlm_cli.composition:LinearOptions", "a part of another package")


@pytest.mark.parametrize("registry", [VISION_TOKENIZERS, FUSIONS], ids=lambda registry: registry.kind)
def test_parts_can_be_loaded(registry):
    for name in registry:
        part = registry[name]
        assert part.name == name and part.summary and isinstance(part.load(), type)
        assert dataclasses.is_dataclass(part.options_class())


def test_packages_may_import_the_old_name() -> None:
    assert Part is RegisteredPart


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
    known = "Known: c-abstractor, latent-attention, linear, mlp"
    assert f"unknown vision tokenizer 'percever'. Did you mean 'perceiver'? {known}" in message
    assert "vlm list vision-tokenizers" in message


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("VIT-b-32", "ViT-B-32"),
        ("ViT-B32", "ViT-B-32"),
        ("perceiver", ""),
        ("", ""),
        ("zzz", ""),
        ("facebook/vit-b-32", ""),
    ],
)
def test_suggestions(name, wanted):
    found = suggest(name, ["ViT-B-32", "ViT-L-14", "RN50"])
    assert found == (f" Did you mean {wanted!r}?" if wanted else "")


def entry_points(*points):
    return lambda group: [point for point in points if point.group == group]


def test_other_packages_add_parts(monkeypatch):
    point = EntryPoint("square", f"{__name__}:PART", "shapes")
    monkeypatch.setattr(vlm_cli.registry, "entry_points", entry_points(point))
    registry = Registry("shape", "shapes")
    assert list(registry) == ["square"] and registry["square"].load()(9) == 3
    assert list(Registry("shape", "other")) == []


def test_other_packages_may_not_take_a_name(monkeypatch):
    point = EntryPoint("square", f"{__name__}:PART", "shapes")
    monkeypatch.setattr(vlm_cli.registry, "entry_points", entry_points(point, point))
    registry = Registry("shape", "shapes")
    with pytest.raises(PluginError, match=f"'square' is registered by {__name__}:PART and by {__name__}:PART"):
        registry["square"]
    registry._built_in["square"] = PART
    with pytest.raises(PluginError, match=f"'square' is registered by vlm-cli and by {__name__}:PART"):
        registry["square"]
    with pytest.raises(ValueError, match="shape 'square' is already registered"):
        registry.add(PART)


BROKEN = """
from vlm_cli.registry import RegisteredPart

ANOTHER_NAME = RegisteredPart("another", "math:sqrt", "vlm_cli.composition:LinearOptions", "")
NO_PART = "math:sqrt"
NO_CLASS = RegisteredPart("no-class", "broken_parts:Missing", "broken_parts:Missing", "")
NO_METHODS = RegisteredPart("no-methods", "collections:OrderedDict", "vlm_cli.composition:LanguageStreamOptions", "")
NO_OPTIONS = RegisteredPart("no-options", "collections:OrderedDict", "collections:OrderedDict", "")
"""
ENTRY_POINTS = """
[vlm_cli.vision_tokenizers]
raises = broken_module:PART
exits = exiting_module:PART
absent = no_such_module_anywhere:PART
renamed = broken_parts:ANOTHER_NAME
no-part = broken_parts:NO_PART
no-class = broken_parts:NO_CLASS
no-methods = broken_parts:NO_METHODS
no-options = broken_parts:NO_OPTIONS
"""


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """An installed package whose parts are all broken; a registry of vision tokenizers that finds it."""
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no such device.\\nSee the manual.')")
    (tmp_path / "exiting_module.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "broken_parts.py").write_text(BROKEN)
    info = tmp_path / "broken_parts-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-parts\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(VISION_TOKENIZERS.__dict__, "_points", raising=False)
    yield VISION_TOKENIZERS
    VISION_TOKENIZERS.__dict__.pop("_points", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "cannot be loaded: RuntimeError: no such device."),
        ("exits", "cannot be loaded: SystemExit: 3."),
        ("absent", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module_anywhere'."),
        (
            "renamed",
            "its entry point 'broken_parts:ANOTHER_NAME' must load to a vlm_cli.registry.RegisteredPart of that",
        ),
        ("no-part", "its entry point 'broken_parts:NO_PART' must load to a vlm_cli.registry.RegisteredPart"),
        ("no-class", "module 'broken_parts' has no attribute 'Missing'"),
        ("no-methods", "collections:OrderedDict lacks the method num_tokens, token_mask."),
        ("no-options", "cannot be loaded: TypeError: must be called with a dataclass"),
    ],
)
def test_a_broken_part_is_told_with_its_package(broken_package, name, message):
    assert name in broken_package
    with pytest.raises(PluginError) as caught:
        part = broken_package[name]
        part.options_class() if name == "no-options" else part.load()
    text = str(caught.value)
    assert text.startswith(f"vision tokenizer {name!r} of the package 'broken-parts' cannot be ") and message in text
    assert text.endswith("Upgrade or uninstall that package.")


def test_options_that_lack_a_setting(broken_package):
    with pytest.raises(PluginError, match="LanguageStreamOptions lacks the setting dim_out"):
        broken_package["no-methods"].options_class()


def test_a_broken_package_is_in_nobodys_way(broken_package):
    assert "raises" in list(broken_package) and broken_package["linear"].load()
    assert Composition.compose("llava").vision_tokenizer.type == "linear"
    with pytest.raises(PluginError, match="broken-parts"):
        Composition.compose("llava", {"vision_tokenizer": "raises"})


def test_broken_parts_do_not_hide_the_others(broken_package):
    told = broken_package.summaries()
    assert set(told) == set(broken_package) and told["perceiver"].startswith("Perceiver Resampler")
    assert told["raises"].startswith("cannot be used: vision tokenizer 'raises' of the package 'broken-parts'")


def test_the_list_goes_on_past_a_broken_part(vlm, broken_package):
    result = vlm("list", "vision-tokenizers")
    assert result.exit_code == 0 and "perceiver" in result.stdout
    assert "cannot be used" in result.stdout and "'broken-parts'" in result.stdout
