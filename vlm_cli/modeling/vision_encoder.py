"""OpenCLIP's image towers, and the encoders of other packages, behind one forward.

B batch, T_img media per row, F frames per medium, C H W pixels, v patches, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.registry import VISION_ENCODERS

__all__ = ["VisionEncoder", "build_tower", "image_size", "patch_features", "set_image_size", "tower_shape"]


def build_tower(vision_config: Mapping[str, Any]) -> nn.Module:
    """A vision encoder with random weights; of OpenCLIP's models, the text tower is never built.

    An encoder of another package is a module, built as `Encoder(vision_config)`, with

        configure(options) -> dict               a class method: plain data, of which `vision_cfg` holds `image_size`
        image_size                               pixels, or (H, W)
        patch_features(pixels, layer) -> Tensor  as the function below
        load_pretrained(name_or_file)            only if it has weights to load

    and options that are a subclass of `VisionEncoderOptions` (docs/composition.md, parts of your own).

    Args:
        vision_config: `embed_dim`, `vision_cfg` and `quick_gelu` as in OpenCLIP's model configurations; or `type`, a
            name of `VISION_ENCODERS`, with what its `configure` gave.
    """
    if "type" in vision_config:
        return VISION_ENCODERS[vision_config["type"]].load()(vision_config)
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    # Without this, timm would fetch ImageNet weights.
    vision_cfg = CLIPVisionCfg(**{**vision_config["vision_cfg"], "timm_model_pretrained": False})
    tower = _build_vision_tower(vision_config["embed_dim"], vision_cfg, vision_config.get("quick_gelu", False))
    return set_image_size(tower)


def set_image_size(tower: nn.Module) -> nn.Module:
    """Fit a timm model, which OpenCLIP builds at that model's own size, to the `image_size` that the tower declares."""
    trunk = getattr(tower, "trunk", None)
    own_size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if hasattr(trunk, "set_input_size") and own_size != tower.image_size:
        tower.set_input_size(tower.image_size)
    return tower


def patch_features(tower: nn.Module, pixels: Tensor, layer: int = -1) -> Tensor:
    """Features of each patch, without class or register tokens, before pooling and projection.

    Args:
        tower: an OpenCLIP VisionTransformer, ModifiedResNet or TimmModel, or one that has this method itself.
        pixels: float[N, C, H, W], normalised as the tower expects.
        layer: -1 is the last layer, after its norm; -2 the one before, without a norm.

    Returns:
        float[N, v, d].
    """
    if (own := getattr(tower, "patch_features", None)) is not None:
        return own(pixels, layer)
    trunk = getattr(tower, "trunk", None)
    if trunk is not None and layer == -1:
        # timm's own path: `forward_intermediates` would leave out FastViT's last convolution.
        features = trunk.forward_features(pixels)
        if features.ndim == 3:
            return features[:, getattr(trunk, "num_prefix_tokens", 0) or 0 :]
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    # CoCa's pooled towers keep the width of the pooler in their last norm, so it cannot be applied to patches.
    norm = layer == -1 and getattr(tower, "attn_pool", None) is None
    found = tower.forward_intermediates(pixels, indices=-layer, normalize_intermediates=norm, intermediates_only=True)
    return found["image_intermediates"][0].flatten(2).transpose(1, 2)


def image_size(tower: nn.Module) -> tuple[int, int]:
    """(H, W) pixels that a tower reads."""
    size = tower.image_size
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def tower_shape(vision_config: Mapping[str, Any], layer: int = -1) -> tuple[int, int]:
    """(v patches, d channels) that a tower gives for one frame, without allocating a weight.

    Raises:
        ValueError: if they are no float[N, v, d].
    """
    with torch.device("meta"), torch.no_grad():
        tower = build_tower(vision_config).eval()
        features = patch_features(tower, torch.empty(1, 3, *image_size(tower)), layer)
    if features.ndim != 3 or len(features) != 1:
        raise ValueError(f"patch_features gives {tuple(features.shape)} for one image, expected (1, v, d)")
    return features.shape[1], features.shape[2]


class VisionEncoder(nn.Module):
    """A tower that reads interleaved media.

    While no parameter of it trains, no graph is kept and batch statistics stay as they were loaded.

    Args:
        visual: the tower, as `build_tower` makes it; its tensors keep their names under `visual.`.
        layer: which layer's patches to return, counted from the end.
    """

    def __init__(self, visual: nn.Module, layer: int = -1) -> None:
        super().__init__()
        self.visual = visual
        self.layer = layer

    def forward(self, vision_x: Tensor) -> Tensor:
        """float[B, T_img, F, C, H, W] -> float[B, T_img, F, v, d]."""
        pixels = vision_x.flatten(0, 2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trainable):
            features = patch_features(self.visual, pixels, self.layer)
        return features.unflatten(0, vision_x.shape[:3])

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) pixels that the tower reads."""
        return image_size(self.visual)

    @property
    def is_trainable(self) -> bool:
        return any(p.requires_grad for p in self.visual.parameters())

    def train(self, mode: bool = True) -> VisionEncoder:
        return super().train(mode and self.is_trainable)
