"""Vision models of Transformers as vision encoders give the features that Transformers itself gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from tests.support import seed_torch, tiny
from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.encoders.structure import infer_grid
from vlm_cli.modeling.towers import build_tower, find_tower_shape, patch_features

_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_WIDE = _VIT | {"intermediate_size": 64}
_STAGES = {"depths": [1, 1], "num_heads": [1, 2], "image_size": 32}

#: Type -> settings, and tokens before the patches.
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "siglip_vision_model": (_WIDE, 0),
    "clip_vision_model": (_WIDE, 1),
    "dinov2_with_registers": (_VIT | {"num_register_tokens": 3}, 4),
    "dinov3_vit": (_WIDE | {"num_register_tokens": 4}, 5),
    "vit": (_WIDE, 1),
    "internvl_vision": (_WIDE | {"image_size": (32, 32), "patch_size": (8, 8)}, 1),
    "deit": (_WIDE, 2),
}
QUICK = ("siglip_vision_model", "clip_vision_model", "dinov3_vit")
TYPES = [x if x in QUICK else pytest.param(x, marks=pytest.mark.matrix) for x in TINY]


@cache
def encoder(kind: str) -> tuple[dict[str, Any], Any, Any]:
    """The configuration of a small encoder, the encoder, and Transformers' own model with the same weights."""
    config = AutoConfig.for_model(kind, **TINY[kind][0])
    vision = {"type": "hf", "config": config.to_dict(), "vision_cfg": {"image_size": 32}}
    seed_torch(0)
    ours = build_tower(vision).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = AutoModel.from_config(config).eval()
    # Patches never pass the pooler, which vlm leaves out.
    assert [x for x in theirs.state_dict() if not x.startswith("pooler.")] == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return vision, ours, theirs


def hidden_states(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
    """The input of the first layer, and what each layer gives."""
    found: list[Tensor] = []
    layers = next(x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == 3)
    handles = [
        layer.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    model(pixel_values=pixels)
    for handle in handles:
        handle.remove()
    return tuple(found)


@pytest.mark.parametrize("kind", TYPES)
@torch.inference_mode()
def test_features_are_those_of_transformers(kind: str) -> None:
    vision, ours, theirs = encoder(kind)
    before, pixels = TINY[kind][1], torch.randn(2, 3, 32, 32)
    layers, last = hidden_states(theirs, pixels), theirs(pixel_values=pixels).last_hidden_state
    if kind == "clip_vision_model":  # as OpenCLIP's towers, it passes patches through the norm of the class token
        last = theirs.post_layernorm(last)
    assert find_tower_shape(vision) == (16, 32) and ours.grid == (4, 4)
    assert torch.equal(patch_features(ours, pixels), last[:, before:])
    assert torch.equal(patch_features(ours, pixels, -2), layers[-2][:, before:])
    assert not torch.equal(patch_features(ours, pixels, -3), layers[-2][:, before:])
    if before:
        with_class = patch_features(ours, pixels, class_token=True)
        assert torch.equal(with_class, torch.cat([last[:, :1], last[:, before:]], dim=1))
    if ours.structure.norm is not None:
        assert torch.equal(patch_features(ours, pixels, norm=False), layers[-1][:, before:])
        normed = ours.get_submodule(ours.structure.norm)(layers[-2])
        assert torch.equal(patch_features(ours, pixels, -2, norm=True), normed[:, before:])


@torch.inference_mode()
def test_several_layers_are_concatenated_in_one_pass() -> None:
    _, ours, _ = encoder("clip_vision_model")
    openclip = tiny.tower("vit")
    pixels, calls = torch.randn(2, 3, 32, 32), 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    for tower, first in ((ours, ours.embeddings), (openclip, openclip.conv1)):
        handle, calls = first.register_forward_hook(count), 0
        features = patch_features(tower, pixels, (-1, -2), class_token=True, norm=False)
        assert calls == 1
        handle.remove()
        alone = [patch_features(tower, pixels, x, class_token=True, norm=False) for x in (-1, -2)]
        assert torch.equal(features, torch.cat(alone, dim=-1))
        assert not torch.equal(features, torch.cat(alone[::-1], dim=-1))
        mixed = patch_features(tower, pixels, (-1, -2))
        assert torch.equal(mixed, torch.cat([patch_features(tower, pixels, x) for x in (-1, -2)], dim=-1))


@torch.inference_mode()
def test_fewer_layers_are_the_first_ones() -> None:
    vision, ours, _ = encoder("siglip_vision_model")
    short = build_tower(vision | {"depth": 2}).eval()
    assert short.load_state_dict(ours.state_dict(), strict=False).missing_keys == []
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(patch_features(short, pixels, norm=False), patch_features(ours, pixels, -2))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("siglip_vision_model", {"class_token": True}, "has no class token"),
        ("siglip_vision_model", {"layer": -4}, "has 3 layers"),
    ],
)
def test_features_that_an_encoder_lacks_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VisionEncoderError, match=message):
        find_tower_shape(encoder(kind)[0], **settings)


def test_grids_follow_the_shape_of_the_image() -> None:
    assert infer_grid(37 * 28, (518, 392)) == (37, 28) and infer_grid(1036, (392, 518)) == (28, 37)
    assert infer_grid(13, (224, 224)) is None
