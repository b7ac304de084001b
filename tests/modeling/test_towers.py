"""Every image tower of OpenCLIP gives what it declares, and each check of that can fail."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from open_clip import factory

from benchmarks.compatibility import reference
from benchmarks.compatibility import towers as matrix
from benchmarks.compatibility.towers import (
    check_declared,
    check_distinct,
    check_folding,
    check_pixels,
    check_real,
    check_tower,
    materialize,
    openclip_preprocessing,
    own_shape,
    shorten,
    towers,
)
from tests.support import tiny
from tests.support.grid import first_of, grid
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.modeling.towers import build_tower, find_image_size, find_tower_shape, patch_features
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.report.language_models import suitable_language_models

#: The smallest of each kind.
SMALL = {
    "ViT-S-32": ("VisionTransformer", 49, 384),
    "RN50": ("ModifiedResNet", 49, 2048),
    "ViTamin-S": ("timm VisionTransformer", 196, 384),
    "PE-Core-T-16-384": ("timm Eva", 576, 192),
    "convnext_tiny": ("timm ConvNeXt", 49, 768),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", SMALL)
def test_small_tower(name: str) -> None:
    row = check_tower(name)
    assert row.verdict, row.reason
    assert (row.kind, row.patches, row.channels) == SMALL[name]
    assert row.ran == "whole" and set(row.tags) == {tag for x, tag in open_clip.list_pretrained() if x == name}


def test_all_towers_are_known() -> None:
    assert sorted(towers()) == sorted(open_clip.list_models())
    assert set(reference.REFERENCE_TOWERS) == set(towers())


def test_a_wrong_declaration_fails_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix._check_config.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "find_tower_shape", lambda config, layer: (49, 385))
        row = check_tower("ViT-S-32")
    matrix._check_config.cache_clear()
    assert not row.verdict and not row.declared.passed and not row.real.passed and row.folding.passed
    assert "layer -1 declares 49 patches of 385 channels and gives (49, 384)." in row.reason


# -- towers without their weights ------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@grid(kind=tiny.VISION, layer=[-1, -2])
def test_materialized_towers_run(kind: str, layer: int) -> None:
    config = copy.deepcopy(tiny.VISION[kind])
    if "timm_model_name" not in config["vision_cfg"] and kind != "resnet":
        config["vision_cfg"]["layers"] = 5
    with torch.device("meta"):
        tower = shorten(build_tower(config))
    depth = len(tower.transformer.resblocks) if hasattr(tower, "transformer") else 2
    materialize(tower).eval()
    with torch.inference_mode():
        features = patch_features(tower, torch.randn(2, 3, *find_image_size(tower)), layer)
    assert depth == 2 and features.shape[1:] == find_tower_shape(config, layer) and features.isfinite().all()
    assert layer != -1 or own_shape(tower) == features.shape[1:]


def test_a_stack_is_cut_and_stages_are_not() -> None:
    with torch.device("meta"):
        tower = shorten(build_tower(find_tower(VisionEncoderOptions(name="convnext_tiny")).config))
        resnet = shorten(build_tower(find_tower(VisionEncoderOptions(name="RN50")).config))
    assert [len(stage.blocks) for stage in tower.trunk.stages] == [2, 2, 2, 2]
    assert [len(getattr(resnet, f"layer{i}")) for i in (1, 2, 3, 4)] == [2, 2, 2, 2]


def test_a_buffer_that_nobody_computes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        tower = build_tower(tiny.VISION["eva02"])
    monkeypatch.setattr(type(tower.trunk.rope), "init_non_persistent_buffers", lambda self: None)
    with torch.inference_mode():
        features = VisionEncoder(materialize(tower).eval())(torch.randn(1, 1, 1, 3, 32, 32))
    assert "not finite" in check_real({-1: features}, {-1: (4, 32)}).problem


# -- comparisons that must fail --------------------------------------------------------------------------------------


def test_a_wrong_declaration_is_noticed() -> None:
    features = {-1: torch.ones(1, 1, 1, 4, 8)}
    assert check_real(features, {-1: (4, 8)}).passed
    assert not check_real(features, {-1: (4, 9)}).passed and not check_real(features, {-1: (5, 8)}).passed
    assert check_declared({-1: (4, 8), -2: (4, 6)}, (4, 8)).passed
    assert not check_declared({-1: (4, 8)}, (4, 9)).passed
    assert not check_declared({-1: (4, 8), -2: (0, 8)}, (4, 8)).passed


def test_a_tower_that_mixes_frames_is_noticed() -> None:
    tower = copy.deepcopy(tiny.tower("resnet"))
    pixels = torch.randn(2, 1, 2, 3, 64, 64)

    def check() -> tuple[bool, bool]:
        encoder = VisionEncoder(tower)
        with torch.inference_mode():
            alone = torch.stack([encoder(x[None, None, None])[0, 0, 0] for x in pixels.flatten(0, 2)])
            return check_folding(encoder(pixels).flatten(0, 2), alone).passed, check_distinct(alone).passed

    assert check() == (True, True)
    tower.train()  # batch statistics: a frame then depends on those beside it
    assert check() == (False, True)


def test_frames_in_another_order_and_blind_towers_are_noticed() -> None:
    alone = torch.randn(4, 5, 6)
    assert check_folding(alone, alone).passed
    assert not check_folding(alone.flip(0), alone).passed
    assert not check_distinct(alone[:1].expand(4, 5, 6)).passed


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")  # no matter for pixels
@pytest.mark.parametrize("name", first_of(["ViT-B-16-SigLIP", "RN50", "MobileCLIP2-S0"]))
def test_preprocessing_is_what_openclip_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "download_pretrained", lambda *args, **kwargs: "none")
    for tag in (None, *open_clip.list_pretrained_tags_by_model(name)):
        with torch.device("meta"):
            visual = open_clip.create_model(name, pretrained=tag, load_weights=False, device="meta").visual
        size = find_image_size(visual)
        assert check_pixels(visual.preprocess_cfg, openclip_preprocessing(name, tag, size)).passed


def test_wrong_pixels_are_noticed() -> None:
    right = openclip_preprocessing("ViT-B-16-SigLIP", "webli", (224, 224))
    assert check_pixels(right, right).difference == 0
    for wrong in (
        {"mean": (0.5, 0.5, 0.51)},
        {"interpolation": "bilinear"},
        {"resize_mode": "shortest"},
        {"size": 225},
    ):
        check = check_pixels({**right, **wrong}, right)
        assert not check.passed and "OpenCLIP's" in check.problem
    assert not check_pixels(openclip_preprocessing("ViT-B-16-SigLIP", None, (224, 224)), right).passed


# -- what the reference works with -----------------------------------------------------------------------------------


def test_reference_counts() -> None:
    of_towers = reference.REFERENCE_TOWERS.values()
    assert sum(x.own_size for x in of_towers) == 80 and sum(x.published for x in of_towers) == 54
    found, working = reference.REFERENCE_LANGUAGE_MODELS_FOUND, reference.REFERENCE_LANGUAGE_MODELS_WORKING
    wrong = reference.REFERENCE_LANGUAGE_MODELS_WRONG_PATH
    assert (len(found), len(working), len(wrong)) == (37, 27, 4)
    assert working < found and not found & wrong
    # The two are no types of Transformers 5.18.
    assert (found | wrong) - set(suitable_language_models()) <= {"internlm3", "iquestcoder"}
