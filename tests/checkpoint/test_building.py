"""The library builds a model without the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm_cli
from tests.support import disk
from vlm_cli.checkpoint import building
from vlm_cli.checkpoint.building import IncompleteWeightsError
from vlm_cli.checkpoint.create import create, plan
from vlm_cli.checkpoint.parts.language_models import LanguageModelSource
from vlm_cli.composition import Composition
from vlm_cli.errors import OutputExistsError, UsageError, VLMError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Composition:
    folder = tmp_path_factory.mktemp("parts")
    tower, lm = disk.tower(folder / "tower"), disk.language_model(folder / "lm")
    return disk.composition(f"local-dir:{tower}", str(lm), "perceiver", "cross-attention")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_build_from_parts(parts: Composition, tmp_path: Path) -> None:
    steps: list[str] = []
    result = vlm_cli.build(parts, tmp_path / "out", seed=1, progress=steps.append)
    assert result.out == tmp_path / "out" and result.parameters.total.parameters > 0 and result.keys is None
    assert steps[0] == "checking the composition" and steps[-1] == f"writing {tmp_path / 'out'}"
    loaded, _ = vlm_cli.load(str(tmp_path / "out"))
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in result.model.state_dict().items())
    with pytest.raises(OutputExistsError):
        vlm_cli.build(parts, tmp_path / "out")


def test_nothing_is_written_without_a_directory(parts: Composition, tmp_path: Path) -> None:
    result = vlm_cli.build(parts)
    assert result.out is None and result.model.device.type == "meta"
    built = vlm_cli.build(parts, tmp_path / "out")
    assert result.parameters == built.parameters


def test_a_delta_loads_no_part_twice(parts: Composition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = LanguageModelSource.load
    monkeypatch.setattr(LanguageModelSource, "load", lambda self, dtype: loads.append(self.name) or load(self, dtype))
    result = vlm_cli.build(parts, tmp_path / "fast", delta=True, seed=3)
    assert len(loads) == 1
    vlm_cli.save_delta(result.model, result.processor, tmp_path / "compared")
    assert len(loads) == 2 and files(tmp_path / "fast") == files(tmp_path / "compared")


@pytest.mark.matrix
def test_a_delta_keeps_what_a_weight_file_brought(parts: Composition, tmp_path: Path) -> None:
    whole = vlm_cli.build(parts, tmp_path / "whole", seed=3)
    state = {name: x.clone() for name, x in load_file(tmp_path / "whole/model.safetensors").items()}
    changed = "lang_model.model.layers.0.mlp.up_proj.weight"
    state[changed] += 1
    save_file(state, tmp_path / "trained.safetensors")
    result = vlm_cli.build(parts, tmp_path / "delta", weights=tmp_path / "trained.safetensors", delta=True)
    assert result.keys is not None and changed in result.keys.loaded
    held = load_file(tmp_path / "delta/delta.safetensors")
    assert changed in held and not any(x.startswith("vision_encoder") for x in held)
    assert not torch.equal(held[changed], whole.model.state_dict()[changed])


def _damaged(state: dict[str, torch.Tensor], damage: str, layer: str) -> dict[str, torch.Tensor]:
    """Add the tensor of one more layer, take one tensor away, or give one another shape."""
    name = next(name for name in state if layer in name)
    if damage == "more":
        return {**state, name.replace(layer, layer.replace("1", "8")): state[name].clone()}
    rest = {key: x for key, x in state.items() if key != name}
    return rest if damage == "fewer" else {**rest, name: torch.cat([state[name], state[name]])}


@pytest.mark.sample(3)
@pytest.mark.parametrize("damage", ["more", "fewer", "shape", "cut"])
@pytest.mark.parametrize("part", ["lm", "tower"])
def test_a_dry_run_refuses_what_the_build_refuses(
    part: str, damage: str, tmp_path: Path, parts: Composition, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, tower = Path(parts.language_model.name), Path(parts.vision_encoder.name.removeprefix("local-dir:"))
    source, name = (lm, "model.safetensors") if part == "lm" else (tower, "open_clip_model.safetensors")
    folder = shutil.copytree(source, tmp_path / part)
    over = {"language_model": str(folder)} if part == "lm" else {"vision_encoder": f"local-dir:{folder}"}
    blueprint = plan(Composition.from_dict(parts.to_dict() | over))
    blueprint.check_weights()
    if damage == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
    else:
        layer = ".layers.1." if part == "lm" else ".resblocks.1."
        save_file(_damaged(load_file(folder / name), damage, layer), folder / name, {"format": "pt"})
    with pytest.raises(VLMError) as of_names:
        blueprint.check_weights()
    with pytest.raises(VLMError) as of_loading:
        create(blueprint)
    assert str(of_names.value) == str(of_loading.value) and type(of_names.value) is type(of_loading.value)
    monkeypatch.setattr(building, "plan", lambda composition, **_: blueprint)
    with pytest.raises(VLMError, match=re.escape(str(of_names.value))):
        vlm_cli.build(parts)


def test_weights_that_do_not_cover_the_model(parts: Composition, tmp_path: Path) -> None:
    save_file({"fusion.nothing": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(IncompleteWeightsError, match="does not fit the composition") as caught:
        vlm_cli.build(parts, tmp_path / "out", weights=tmp_path / "w.safetensors")
    assert caught.value.keys.unused == ["fusion.nothing"] and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--random-weights loads none"):
        vlm_cli.build(parts, tmp_path / "out", delta=True, random_weights=True)


def test_weights_that_the_model_has_no_place_for(parts: Composition, tmp_path: Path) -> None:
    vlm_cli.build(parts, tmp_path / "whole")
    state = load_file(tmp_path / "whole/model.safetensors")
    harmless = ("optimizer.step", "lang_model.model.layers.0.self_attn.rotary_emb.inv_freq")
    save_file({**state, **{name: torch.ones(1) for name in harmless}}, tmp_path / "w.safetensors")
    result = vlm_cli.build(parts, weights=tmp_path / "w.safetensors")
    assert result.keys is not None and set(result.keys.unused) == set(harmless) and not result.keys.surplus
    more = "lang_model.model.layers.9.mlp.up_proj.weight"
    save_file({**state, more: torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(IncompleteWeightsError, match=rf"1 have no place in the model, e\.g\. '{more}'"):
        vlm_cli.build(parts, weights=tmp_path / "w.safetensors")
