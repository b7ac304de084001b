"""Several encoders at once: each gives what it gives alone, with pixels of its own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

from tests.support import ROOT, disk, seed_torch
from vlm_cli.checkpoint.create import check_fit, plan
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, load_tower
from vlm_cli.composition import UNTILED, Composition, SeveralEncoderOptions, VisionEncoderOptions
from vlm_cli.errors import CompositionError, VisionEncoderError
from vlm_cli.modeling.towers import find_tower_shape, patch_features
from vlm_cli.preprocessing import Preprocessing, make_preprocessing
from vlm_cli.tiling import check_tiling

_VIT: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A SigLIP of 4 x 4 patches, and a DINOv2 of any size, as directories."""
    root = tmp_path_factory.mktemp("encoders")
    seed_torch(0)
    siglip = hf.SiglipVisionModel(hf.SiglipVisionConfig(**_VIT, intermediate_size=64, image_size=32))
    dino = hf.Dinov2Model(hf.Dinov2Config(**_VIT, image_size=56))
    for folder, model in (("siglip", siglip), ("dino", dino)):
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        model.save_pretrained(root / folder)
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    crop = {"height": 32, "width": 32}
    hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size=crop).save_pretrained(root / "dino")
    return f"hf:{root / 'siglip'}", f"hf:{root / 'dino'}"


@pytest.mark.matrix
@torch.inference_mode()
def test_each_encoder_gives_what_it_gives_alone(names: tuple[str, str]) -> None:
    parts = [VisionEncoderOptions(name=names[0]), VisionEncoderOptions(name=names[1], layer=-2, image_size=64)]
    tower = find_tower(SeveralEncoderOptions(encoders=tuple(parts)))
    together: Any = load_tower(tower).eval()
    with Image.open(ROOT / "examples" / "images" / "cat.jpg") as image:
        picture = image.convert("RGB")
    pixels = make_preprocessing(tower.config["preprocess"])(picture)[None]
    features = patch_features(together, pixels)
    assert pixels.shape == (1, 6, 64, 64) and find_tower_shape(tower.config) == features.shape[1:] == (16, 64)
    alone = []
    for part in parts:
        one = find_tower(part)
        own = Preprocessing(one.config["preprocess"])(picture)[None]
        alone.append(patch_features(load_tower(one).eval(), own, part.layer))
    # 8 x 8 patches of the second become 4 x 4, each the mean of 2 x 2.
    pooled = torch.nn.functional.avg_pool2d(alone[1].mT.unflatten(2, (8, 8)), 2).flatten(2).mT
    assert torch.equal(features[..., :32], alone[0])
    torch.testing.assert_close(features[..., 32:], pooled, atol=1e-5, rtol=1e-5)
    pixels[:, 3:] += 0.1
    assert torch.equal(patch_features(together, pixels)[..., :32], alone[0])
    assert not torch.allclose(patch_features(together, pixels)[..., 32:], pooled, atol=1e-3)


def test_a_composition_holds_a_list_and_gives_it_back(names: tuple[str, str]) -> None:
    data = {"vision_encoder": [names[0], {"name": names[1], "layer": -2}], "language_model": "lm"}
    composition = Composition.compose("llava", data)
    written = composition.to_dict()["vision_encoder"]
    assert [x["name"] for x in written] == list(names) and [x["layer"] for x in written] == [-1, -2]
    assert Composition.from_dict(composition.to_dict()) == composition


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        (["a"], "2 to 8 encoders, got 1"),
        (["a", {"layer": -2}], r"vision_encoder\[1\] has no name"),
        (["a", {"name": "b", "class_token": True}], "class_token does not go with several"),
        (["a", {"name": "b", "layr": -2}], r"unknown key vision_encoder\[1\].layr. Did you mean 'layer'"),
    ],
)
def test_lists_that_cannot_be_are_refused(encoders: list[Any], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        Composition.compose("llava", {"vision_encoder": encoders, "language_model": "lm"})


def test_grids_that_cannot_be_brought_together_are_refused(names: tuple[str, str]) -> None:
    parts = VisionEncoderOptions(name=names[0]), VisionEncoderOptions(name=names[1], image_size=56)
    with pytest.raises(VisionEncoderError, match="cannot be brought together: they have 4 x 4 and 7 x 7 patches"):
        find_tower_shape(find_tower(SeveralEncoderOptions(encoders=parts)).config)


def test_a_tiling_for_encoders_of_two_sizes_is_refused_before_the_first_picture(
    names: tuple[str, str], tmp_path: Path
) -> None:
    disk.tiny_language_model.make(tmp_path)
    parts = [names[0], {"name": names[1], "image_size": 64}]
    data = {"vision_encoder": parts, "language_model": str(tmp_path), "tiling": {"type": "grid"}}
    composition = Composition.compose("llava", data)
    with pytest.raises(CompositionError, match="tiles for several encoders of 32x32 and 64x64 pixels"):
        check_fit(plan(composition))
    sizes = make_preprocessing(find_tower(composition.vision_encoder).config["preprocess"]).tiles
    check_tiling(composition.tiling, sizes[0], sizes[0])
    check_tiling(UNTILED, *sizes)
    with pytest.raises(CompositionError, match="leave out the tiling"):
        check_tiling(composition.tiling, *sizes)


@pytest.mark.matrix
def test_a_model_of_two_encoders_is_built_loaded_and_asked(names: tuple[str, str], tmp_path: Path) -> None:
    tiny_lm = tmp_path / "lm"
    runpy.run_path(str(ROOT / "examples" / "tiny_language_model.py"))["make"](tiny_lm)
    listed = f"vision_encoder=[{names[0]!r}, {{name: {names[1]!r}, layer: -2}}]"
    words = ["--family", "llava", "--language-model", tiny_lm, "--set", listed, "--quiet"]
    assert disk.run("build", tmp_path / "model", *words).exit_code == 0
    picture = ROOT / "examples" / "images" / "cat.jpg"
    for word in ("generate", "inspect"):
        ask = ["-m", tmp_path / "model", "-i", picture, "-n", 2, "Look"] if word == "generate" else [tmp_path / "model"]
        result = disk.run(word, *ask)
        assert result.exit_code == 0, result.stderr
    assert "6, 32, 32" in result.stdout
    assert "Preprocessing 1" in result.stdout and "Preprocessing 2" in result.stdout
    assert max(map(len, result.stdout.partition("Preprocessing")[2].splitlines())) <= 80
