"""`hf:` of a whole image-text model of Transformers takes its vision half, with that module's features."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlm_cli.checkpoint.parts.plain_types import order_positions
from vlm_cli.checkpoint.parts.vision_encoders import check_tower_weights, find_tower, load_tower
from vlm_cli.checkpoint.parts.vision_halves import take_vision_half
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import CheckpointError, VisionEncoderError
from vlm_cli.modeling.towers import build_tower, patch_features

_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT |= {"image_size": 32, "patch_size": 8}
_CLIP, _SIGLIP, _PIXTRAL = ({**_VIT, "model_type": x} for x in ("clip_vision_model", "siglip_vision_model", "pixtral"))
_SIGLIP |= {"projection_dim": 16}  # of PaliGemma
_INTERN: dict[str, Any] = {**_VIT, "image_size": [32, 32], "patch_size": [8, 8]}
_SAM: dict[str, Any] = {**_VIT, "image_size": 64, "patch_size": 16, "output_channels": 16, "mlp_dim": 64}
_SAM |= {"window_size": 2, "global_attn_indexes": [1], "post_conv_in_channels": 16}
_TIMM: dict[str, Any] = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "do_pooling": False}
_TIMM |= {"hidden_size": 24, "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}}
_FLORENCE: dict[str, Any] = {"embed_dim": [8, 16], "depths": [1, 1], "num_heads": [1, 2], "num_groups": [1, 2]}
_FLORENCE |= {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}

#: Type -> sizes of a small vision half.
WHOLE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("aria", "granite_docling", "idefics2", "idefics3", "ovis2", "smolvlm"), _VIT),
    **dict.fromkeys(("blip", "blip-2", "git", "instructblip", "instructblipvideo", "janus", "kosmos-2"), _VIT),
    **dict.fromkeys(("aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "gemma3", "pi0"), _SIGLIP),
    **dict.fromkeys(("llava_onevision", "paligemma", "shieldgemma2", "t5gemma2"), _SIGLIP),
    "internvl": _INTERN,
    **dict.fromkeys(("granite4_vision", "llava", "llava_next", "llava_next_video", "video_llava", "vipllava"), _CLIP),
    **dict.fromkeys(("got_ocr2", "pp_chart2table", "pp_formulanet"), _SAM),
    **dict.fromkeys(("fast_vlm", "perception_lm"), _TIMM),
    **dict.fromkeys(("lighton_ocr", "mistral3"), _PIXTRAL),
    "florence2": _FLORENCE,
    "gemma3n": {**_TIMM, "model_type": "gemma3n_vision"},
    "idefics": {**{k: x for k, x in _VIT.items() if k != "hidden_size"}, "embed_dim": 32},
    "vision-encoder-decoder": {**_VIT, "model_type": "vit"},
}
#: Types of each way in which a half is found: under a plain name, with renamed tensors, in an inner model, on its own.
_QUICK = ("idefics3", "ovis2", "pi0", "got_ocr2")
#: Type -> settings that lead to the vision half, from outside in.
_PLACES = {"pi0": ["vlm_config", "vision_config"], "t5gemma2": ["encoder", "vision_config"]}
_PLACES["vision-encoder-decoder"] = ["encoder"]
#: Type -> the module in its vision module whose output the features are: its own output merges patches.
_INNER = {"ovis2": "transformer"}


def make_config(kind: str) -> Any:
    """Make a whole model's configuration with a small vision half and the type's own language model."""
    whole: Any = CONFIG_MAPPING[kind]()
    *outer, last = _PLACES.get(kind, ["vision_config"])
    owner = whole
    for name in outer:
        owner = getattr(owner, name)
    own = getattr(owner, last)
    sizes = WHOLE[kind]
    if kind == "granite4_vision":  # without a default
        whole.deepstack_layer_map, whole.downsample_rate = [(-1, 0)], "1/2"
    setattr(owner, last, CONFIG_MAPPING[sizes.get("model_type") or own.model_type](**sizes))
    return whole


def write_whole(folder: Path, kind: str) -> nn.Module:
    """Write a whole model whose tensors of the language model are left out, and return its vision module."""
    config = make_config(kind)
    with torch.device("meta"):
        whole: Any = AutoModelForImageTextToText.from_config(config)
    half = config
    for name in _PLACES.get(kind, ["vision_config"]):
        half = getattr(half, name)
    name, module = next(
        (n, x) for n, x in whole.named_modules() if n and type(getattr(x, "config", None)) is type(half)
    )
    torch.manual_seed(0)
    own = type(module)(half).eval()
    for p in own.parameters():
        nn.init.normal_(p, std=0.2)
    config.save_pretrained(folder)
    tensors = {f"{name}.{key}": x for key, x in own.state_dict().items()}
    published = revert_weight_conversion(whole, tensors)  # published files have the names of earlier releases
    written = {key: x.contiguous() for key, x in published.items()}
    save_file({**written, "lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return own


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [*_QUICK, *sorted(WHOLE.keys() - set(_QUICK))])
@torch.inference_mode()
def test_features_are_those_of_the_whole_models_vision_module(kind: str, tmp_path: Path) -> None:
    theirs = write_whole(tmp_path, kind)
    tower = find_tower(VisionEncoderOptions(name=f"hf:{tmp_path}"))
    check_tower_weights(tower)
    ours: Any = load_tower(tower).eval()
    pixels = torch.randn(2, 3, *ours.pixel_size)
    last = theirs.get_submodule(_INNER.get(kind, ""))(pixels).last_hidden_state
    last = last.flatten(2).mT if last.ndim == 4 else last.reshape(2, -1, last.shape[-1])
    found = ours.structure
    norm = False if found.norm is not None and not found.is_normed else None
    features = patch_features(ours, pixels, norm=norm)
    torch.testing.assert_close(features, last[:, found.before : last.shape[1] - found.after], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(features, patch_features(ours, pixels + 0.1, norm=norm), atol=1e-3)


@pytest.mark.matrix
def test_each_type_gives_its_vision_half_or_the_reason_why_not() -> None:
    """One that a later release adds does one or the other, too: both follow from its structure."""
    kinds = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    refused = {}
    for kind in kinds:
        try:
            take_vision_half(kind, make_config(kind) if kind in WHOLE else CONFIG_MAPPING[kind]())
        except VisionEncoderError as error:
            refused[kind] = str(error)
    assert WHOLE.keys() == set(kinds) - refused.keys()
    for kind, message in refused.items():
        assert re.search(
            "cannot be a vision encoder: (it|the files)|in which Transformers has no vision model", message
        ), kind
    assert "takes their grid as another argument" in refused["qwen2_vl"] and "into codes" in refused["chameleon"]
    assert "merges neighbouring patches" in refused["llama4"]


def test_a_row_of_positions_is_that_of_the_published_code() -> None:
    table = torch.arange(19 * 19.0)[:, None]
    assert not torch.equal(order_positions(table), table), "two patches of 19 share a row"
    table = torch.arange(32 * 32.0)[:, None]
    assert torch.equal(order_positions(table), table)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architecture": "hf-hub:org/name"}, "may only be a name that timm itself has"),
        ({"model_args": {"checkpoint_path": "weights.pth"}}, "checkpoint_path, and vlm gives it only sizes"),
        ({"model_args": {"depth": "many"}}, "depth must be a whole number"),
    ],
)
def test_a_configuration_gives_timm_only_sizes(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    vision = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224"} | settings
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perception_lm", "vision_config": vision}))
    with pytest.raises(VisionEncoderError, match=words):
        find_tower(VisionEncoderOptions(name=f"hf:{tmp_path}"))
    with pytest.raises(CheckpointError, match=words):
        build_tower({"type": "hf", "config": vision, "vision_cfg": {"image_size": 32}})
