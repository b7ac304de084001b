"""`timm:` names: models of timm, with weights that timm's own functions would load, and timm's own pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.support import ROOT, seed_torch
from vlm_cli.checkpoint.parts.timm_models import find_timm_tower
from vlm_cli.checkpoint.parts.vision_encoders import check_tower_weights, find_tower, load_tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import UnknownNameError, VisionEncoderError
from vlm_cli.modeling.towers import find_tower_shape, patch_features
from vlm_cli.preprocessing import Preprocessing

#: Name -> patches and channels. The first of them goes through a vision transformer, a CNN and so on.
SHAPES = {
    "test_vit": (100, 64),
    "test_vit2": (100, 64),
    "test_convnext": (25, 64),
    "test_efficientnet": (25, 256),
    "test_resnet": (25, 96),
    "test_mambaout": (25, 64),
}
QUICK = ("test_vit",)
NAMES = [x if x in QUICK else pytest.param(x, marks=pytest.mark.matrix) for x in SHAPES]


def write(name: str, folder: Path) -> tuple[Any, Path]:
    """A model of timm with its classifier, and a file of its weights."""
    seed_torch(0)
    model: Any = timm.create_model(name).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    file = folder / f"{name}.safetensors"
    save_file(model.state_dict(), file)
    return model, file


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_pixels_and_features_are_those_of_timm(name: str, tmp_path: Path) -> None:
    theirs, file = write(name, tmp_path)
    tower = find_tower(VisionEncoderOptions(name=f"timm:{name}", pretrained=str(file)))
    check_tower_weights(tower)
    ours: Any = load_tower(tower).eval()
    prepare = Preprocessing(tower.config["preprocess"])
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(theirs.pretrained_cfg))
    for picture in ("cat.jpg", "rocket.jpg"):
        with Image.open(ROOT / "examples" / "images" / picture) as image:
            photo = image.convert("RGB")
        pixels = prepare(photo)[None]
        assert torch.equal(pixels[0], transform(photo))
        last = theirs.forward_features(pixels)
        if last.ndim == 4:
            last = last.flatten(1, 2) if name == "test_mambaout" else last.flatten(2).mT  # timm has both orders
        else:
            last = last[:, theirs.num_prefix_tokens :]
        assert torch.equal(patch_features(ours, pixels), last)
        assert find_tower_shape(tower.config) == last.shape[1:] == SHAPES[name]
        assert not torch.equal(patch_features(ours, pixels + 0.1), last)


@pytest.mark.matrix
@torch.inference_mode()
def test_layers_sizes_and_depth_are_those_of_openclip_towers(tmp_path: Path) -> None:
    theirs, file = write("test_vit", tmp_path)
    settings = {"name": "timm:test_vit", "pretrained": str(file)}
    pixels = torch.randn(1, 3, 160, 160)
    found = theirs.forward_intermediates(pixels, indices=[1], norm=False, intermediates_only=True)[0].flatten(2).mT
    ours: Any = load_tower(find_tower(VisionEncoderOptions(**settings))).eval()
    depth = len(theirs.blocks)
    assert torch.equal(patch_features(ours, pixels, 1 - depth), found)
    short: Any = load_tower(find_tower(VisionEncoderOptions(**settings, depth=2))).eval()
    assert len(short.trunk.blocks) == 2 and torch.equal(patch_features(short, pixels, norm=False), found)
    large: Any = load_tower(find_tower(VisionEncoderOptions(**settings, image_size=192))).eval()
    assert patch_features(large, torch.randn(1, 3, 192, 192)).shape[1] == 144
    assert patch_features(ours, pixels, class_token=True).shape[1] == 101


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "shape"), [("volo_d1_224", (196, 384)), ("pit_ti_224", (49, 256))])
def test_models_that_return_their_class_token_give_patches(name: str, shape: tuple[int, int]) -> None:
    assert find_tower_shape(find_tower(VisionEncoderOptions(name=f"timm:{name}")).config) == shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_base_patch16_242", r"has no model 'vit_base_patch16_242'\. Did you mean 'vit_base_patch16_224'"),
        ("timm:test_vit.no", r"timm has no tag 'no'\. Known tags: r160_in1k"),
        ("timm:hf-hub:org/name", "has no model 'hf-hub:org/name'"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        find_timm_tower(VisionEncoderOptions(name=name))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VisionEncoderError, match="there is no file"):
        find_tower(VisionEncoderOptions(name="timm:test_vit", pretrained=str(tmp_path / "none")))
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "one.safetensors")
    tower = find_tower(VisionEncoderOptions(name="timm:test_vit", pretrained=str(tmp_path / "one.safetensors")))
    for load in (check_tower_weights, load_tower):
        with pytest.raises(VisionEncoderError, match=r"lack .* tensors of timm's model 'test_vit'"):
            load(tower)


def test_a_configuration_sets_sizes_of_a_model_and_nothing_else() -> None:
    """Other arguments of timm's models, such as `checkpoint_path`, load files."""
    tower = {"type": "timm", "name": "test_vit", "vision_cfg": {"image_size": 32}, "args": {"img_size": 32, "depth": 2}}
    assert find_tower_shape(tower) == (4, 64) and find_tower_shape(tower | {"args": {"img_size": 64}})[0] == 4
    assert find_tower_shape(tower | {"args": {"embed_dim": 32, "num_heads": 2}}) == (4, 32)
    with pytest.raises(VisionEncoderError, match=r"would get checkpoint_path; vlm sets only img_size"):
        find_tower_shape(tower | {"args": {"checkpoint_path": "weights.bin"}})
