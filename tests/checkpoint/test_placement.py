"""A model that no device holds: which module goes where, and that its answers stay what they are."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

import vlm_cli
from tests.support import disk, tiny
from tests.support.grid import grid
from vlm_cli.checkpoint.placement import DISK, describe_places, places_for, spread
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.language_model import decoder_layers
from vlm_cli.modeling.vlm import VLM

PLENTY = 1 << 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("placement")
    named = f"local-dir:{disk.tower(path / 'tower')}", str(disk.language_model(path / "lm"))
    disk.write(path / "flamingo", disk.composition(*named, "perceiver", "cross-attention"))
    return path / "flamingo"


def held(model: VLM, places: dict[str, int | str]) -> dict[int | str, int]:
    """Bytes on each device in float32, by a slow reading: each parameter is covered by one module."""
    found: dict[int | str, int] = {}
    for name, parameter in model.named_parameters():
        [place] = [place for module, place in places.items() if name == module or name.startswith(module + ".")]
        found[place] = found.get(place, 0) + 4 * parameter.numel()
    return found


@grid(
    language_model=tiny.LANGUAGE_MODELS,
    fusion=["cross-attention", "language-stream"],
    quick={"language_model": ("llama", "gpt2"), "fusion": ["cross-attention"]},
)
def test_layers_fill_devices_in_turn(language_model, fusion):
    model = copy.deepcopy(tiny.build(language_model=language_model, fusion=fusion)).to("meta")  # the tower is shared
    layers = decoder_layers(model.lang_model)
    sizes = [4 * sum(p.numel() for p in layer.parameters()) for layer in layers]
    together = 4 * sum(p.numel() for p in model.parameters()) - sum(sizes)
    names = {id(module): name for name, module in model.named_modules()}

    def places(memory):
        found = spread(model, torch.float32, memory)
        where = [found[names[id(layer)]] for layer in layers]
        others = {place for name, place in found.items() if name not in {names[id(layer)] for layer in layers}}
        assert others == {next(iter(memory))}  # what each call enters and leaves stays together
        assert all(size <= memory.get(place, PLENTY) for place, size in held(model, found).items())
        return where

    last = len(layers) - 1
    assert set(places({0: PLENTY, "cpu": PLENTY})) == {0}
    assert places({0: together + sizes[0], 1: PLENTY, "cpu": PLENTY}) == [0] + [1] * last
    assert places({0: together, 1: sizes[0], "cpu": PLENTY}) == [1] + ["cpu"] * last
    # One layer's room stays free on the first device, where layers from disk run.
    assert places({"cpu": together + max(sizes)}) == [DISK] * len(layers)
    assert places({"cpu": together + sum(sizes)}) == ["cpu"] * len(layers)
    with pytest.raises(CheckpointError, match=r"and the CPU has .* Give it more: --max-memory cpu=SIZE"):
        places({"cpu": together + max(sizes) - 1})


@pytest.mark.matrix
def test_answers_with_layers_on_disk_are_the_same(folder, vlm):
    whole, processor = vlm_cli.load(str(folder))
    sizes = sum(p.numel() * p.element_size() for p in whole.parameters())
    places = places_for(whole.config, "auto", {"cpu": sizes - 1})
    assert DISK in places.values()
    spread_model, _ = vlm_cli.load(str(folder), device_map="auto", max_memory={"cpu": sizes - 1})
    assert re.search(r" on the CPU, .* on disk$", describe_places(spread_model))
    assert describe_places(whole) is None
    batch = processor(text="a cat")
    with torch.no_grad():
        expected = whole(**batch).logits
        assert torch.equal(spread_model(**batch).logits, expected)
        with tiny.nudged(next(iter(decoder_layers(whole.lang_model)[-1].parameters()))):
            assert not torch.equal(whole(**batch).logits, expected)
    flags = ["--device-map", "auto", "--max-memory", f"cpu={sizes // 1000 - 1}KB", "--max-new-tokens", "4"]
    found = vlm("generate", "--model", folder, "a cat", *flags)
    assert found.exit_code == 0 and " on disk, " in found.stderr, found.stderr
    assert found.stdout == vlm("generate", "--model", folder, "a cat", "--max-new-tokens", "4").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device-map", "balanced"], "--device-map knows auto, got 'balanced'"),
        (["--max-memory", "cpu=1GB"], "--max-memory has no effect without --device-map auto"),
        (["--device-map", "auto", "--max-memory", "gpu=1GB"], "such as 0=20GB,cpu=8GB, got 'gpu=1GB'"),
        (["--device-map", "auto", "--device", "cpu"], "--device and --device-map exclude each other"),
        (["--device-map", "auto", "--quantize", "int8"], "--quantize needs the whole model on one device"),
        (["--device-map", "auto", "--compile"], "--compile needs the whole model on one device"),
    ],
)
def test_wrong_usage(folder, vlm, flags, words):
    found = vlm("generate", "--model", folder, "a cat", *flags)
    assert found.exit_code == 2 and words in found.stderr
