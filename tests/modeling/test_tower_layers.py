"""Which layer each parameter of a tower belongs to, for learning rates that fall from layer to layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay

from tests.support import tiny
from vlm_cli.modeling.tower_layers import number_layers
from vlm_cli.modeling.towers import build_tower


@pytest.mark.parametrize("kind", ["siglip", "convnext", "swin"])
def test_timm_s_models_have_the_layers_of_timm_s_own_decay(kind: str) -> None:
    tower: Any = build_tower(copy.deepcopy(tiny.VISION[kind]))
    names = {p: f"trunk.{name}" for name, p in tower.trunk.named_parameters()}
    theirs = {
        names[p]: group["lr_scale"]
        for group in param_groups_layer_decay(tower.trunk, layer_decay=0.5)
        for p in group["params"]
    }
    ours = number_layers(tower)
    assert {name: 0.5 ** ours[name] for name in theirs} == pytest.approx(theirs)
    assert set(ours) == {name for name, _ in tower.named_parameters()} and max(ours.values()) > 1


@pytest.mark.parametrize("layer", [-1, -2, (-2, -1)])
def test_openclip_s_transformer(layer: Any) -> None:
    tower = build_tower(copy.deepcopy(tiny.VISION["coca"]))
    found = number_layers(tower, layer)
    below = 1 if layer == -2 else 0  # the last layer, which nobody reads, counts as the one below it
    assert found["conv1.weight"] == found["class_embedding"] == found["ln_pre.weight"] == 2 - below
    assert found["transformer.resblocks.0.ln_1.weight"] == 1 - below
    assert found["transformer.resblocks.1.ln_1.weight"] == found["ln_post.weight"] == found["attn_pool.query"] == 0


def test_a_vision_model_of_transformers() -> None:
    from transformers import SiglipVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = SiglipVisionConfig(**sizes, image_size=32, patch_size=16).to_dict()
    tower = build_tower({"type": "hf", "config": config, "vision_cfg": {"image_size": 32}})
    found = number_layers(tower)
    numbers = {name.split("layers.")[1][0]: number for name, number in found.items() if "layers." in name}
    assert numbers == {"0": 2, "1": 1, "2": 0}
    assert {number for name, number in found.items() if "embeddings" in name} == {3}
    assert {number for name, number in found.items() if "post_layernorm" in name} == {0}


def test_several_encoders_count_their_own_layers() -> None:
    vit = copy.deepcopy(tiny.VISION["vit"])
    deep = copy.deepcopy(vit)
    deep["vision_cfg"]["layers"] = 4
    tower = build_tower({"type": "several", "encoders": [vit, {**deep, "features": {"layer": -2}}]})
    found = number_layers(tower)
    assert found["encoders.0.conv1.weight"] == 2 and found["encoders.1.conv1.weight"] == 3
    assert found["encoders.1.transformer.resblocks.2.ln_1.weight"] == 0


@pytest.mark.parametrize("tower", [torch.nn.Linear(1, 1), build_tower(copy.deepcopy(tiny.VISION["resnet"]))])
def test_a_tower_without_a_stack_of_layers(tower: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        number_layers(tower)
