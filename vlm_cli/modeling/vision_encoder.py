"""OpenCLIP's image towers, and the encoders of other packages, behind one forward.

B batch, T_img media per row, F frames per medium, C H W pixels, v patches, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.errors import VisionEncoderError
from vlm_cli.registry import VISION_ENCODERS

__all__ = [
    "VisionEncoder",
    "build_tower",
    "deduplicate",
    "image_size",
    "patch_features",
    "set_image_size",
    "tower_shape",
    "truncate_layers",
]


def build_tower(vision_config: Mapping[str, Any]) -> nn.Module:
    """A vision encoder with random weights; of OpenCLIP's models, the text tower is never built.

    An encoder of another package is a module, built as `Encoder(vision_config)`, with

        configure(options) -> dict               a class method: plain data, of which `vision_cfg` holds `image_size`
        image_size                               pixels, or (H, W)
        patch_features(pixels, layer) -> Tensor  as the function below
        load_pretrained(name_or_file)            only if it has weights to load

    and options that are a subclass of `VisionEncoderOptions` (docs/composition.md, parts of your own).

    Args:
        vision_config: `embed_dim`, `vision_cfg` and `quick_gelu` as in OpenCLIP's model configurations, and `depth`
            if only so many layers are kept; or `type`, a name of `VISION_ENCODERS`, with what its `configure` gave.

    Raises:
        VisionEncoderError: if `depth` layers cannot be kept.
    """
    if "type" in vision_config:
        return VISION_ENCODERS[vision_config["type"]].load()(vision_config)
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    # Without this, timm would fetch ImageNet weights.
    vision_cfg = CLIPVisionCfg(**{**vision_config["vision_cfg"], "timm_model_pretrained": False})
    tower = _build_vision_tower(vision_config["embed_dim"], vision_cfg, vision_config.get("quick_gelu", False))
    if hasattr(tower, "trunk") and vision_cfg.act_kwargs:
        _set_gelu(tower.trunk, **vision_cfg.act_kwargs)
    return truncate_layers(set_image_size(tower), vision_config.get("depth"))


def _set_gelu(trunk: nn.Module, approximate: str) -> None:
    """Choose the GELU of a timm model, which OpenCLIP leaves at timm's own: SigLIP was trained with "tanh"."""
    for module in trunk.modules():
        if isinstance(module, nn.GELU):
            module.approximate = approximate


def truncate_layers(tower: nn.Module, depth: int | None) -> nn.Module:
    """Keep the first `depth` layers of OpenCLIP's or timm's vision transformer; None keeps all.

    Raises:
        VisionEncoderError: if the tower is no single stack of layers, or has fewer.
    """
    if depth is None:
        return tower
    stack = _stack(tower)
    if stack is None:
        raise VisionEncoderError("the tower is no single stack of layers that could be cut; leave out depth.")
    owner, name = stack
    layers = getattr(owner, name)
    if depth > len(layers):
        raise VisionEncoderError(f"the tower has {len(layers)} layers, so depth can be at most {len(layers)}.")
    setattr(owner, name, layers[:depth])
    return tower


def _stack(tower: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the layers of a vision transformer, and under which name; None for other towers."""
    if hasattr(getattr(tower, "transformer", None), "resblocks"):
        return tower.transformer, "resblocks"
    trunk = getattr(tower, "trunk", None)
    # What timm's convolutional trunks call `blocks` are stages, each of another width; they have no prefix tokens.
    return (trunk, "blocks") if hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens") else None


def _has_class_token(tower: nn.Module) -> bool:
    owner, name = (tower.trunk, "cls_token") if hasattr(tower, "trunk") else (tower, "class_embedding")
    return getattr(owner, name, None) is not None


def _has_norm(tower: nn.Module) -> bool:
    """Whether the last norm is one of patches, and not of what was pooled (CoCa, and timm's `fc_norm`)."""
    owner, name = (tower.trunk, "norm") if hasattr(tower, "trunk") else (tower, "ln_post")
    has_norm = not isinstance(getattr(owner, name, None), (nn.Identity, type(None)))
    return has_norm and getattr(tower, "attn_pool", None) is None


def set_image_size(tower: nn.Module) -> nn.Module:
    """Fit a timm model, which OpenCLIP builds at that model's own size, to the `image_size` that the tower declares."""
    trunk = getattr(tower, "trunk", None)
    own_size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if hasattr(trunk, "set_input_size") and own_size != tower.image_size:
        tower.set_input_size(tower.image_size)
    return tower


def patch_features(
    tower: nn.Module, pixels: Tensor, layer: int = -1, *, class_token: bool = False, norm: bool | None = None
) -> Tensor:
    """Features of each patch, without register tokens, before pooling and projection.

    Args:
        tower: an OpenCLIP VisionTransformer, ModifiedResNet or TimmModel, or one that has this method itself.
        pixels: float[N, C, H, W], normalised as the tower expects.
        layer: -1 is the last layer, -2 the one before.
        class_token: whether the features begin with the class token.
        norm: whether the tower's last norm is applied; None: to the last layer only.

    Returns:
        float[N, v, d]; v counts the class token.

    Raises:
        VisionEncoderError: if the tower does not have the class token or the norm that is spoken of.
    """
    if (own := getattr(tower, "patch_features", None)) is not None:
        if class_token or norm is not None:
            raise VisionEncoderError("class_token and norm are settings of OpenCLIP's towers; leave them out.")
        return own(pixels, layer)
    if class_token and not (_stack(tower) and _has_class_token(tower)):
        raise VisionEncoderError("the tower has no class token; leave out class_token.")
    if norm is not None and not (_stack(tower) and _has_norm(tower)):
        raise VisionEncoderError("the tower has no last norm of its patches that could be chosen; leave out norm.")
    trunk = getattr(tower, "trunk", None)
    if trunk is not None and layer == -1 and norm is not False:
        # timm's own path: `forward_intermediates` would leave out FastViT's last convolution.
        features = trunk.forward_features(pixels)
        if features.ndim == 3:
            patches = features[:, getattr(trunk, "num_prefix_tokens", 0) or 0 :]
            return torch.cat([features[:, :1], patches], dim=1) if class_token else patches
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    # CoCa's pooled towers keep the width of the pooler in their last norm, so it cannot be applied to patches.
    applies = layer == -1 and getattr(tower, "attn_pool", None) is None if norm is None else norm
    found = tower.forward_intermediates(
        pixels,
        indices=-layer,
        normalize_intermediates=applies,
        intermediates_only=True,
        output_extra_tokens=class_token,
    )
    patches = found["image_intermediates"][0].flatten(2).transpose(1, 2)
    return torch.cat([found["image_intermediates_prefix"][0][:, :1], patches], dim=1) if class_token else patches


def image_size(tower: nn.Module) -> tuple[int, int]:
    """(H, W) pixels that a tower reads."""
    size = tower.image_size
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def tower_shape(
    vision_config: Mapping[str, Any], layer: int = -1, *, class_token: bool = False, norm: bool | None = None
) -> tuple[int, int]:
    """(v patches, d channels) that a tower gives for one frame, without allocating a weight.

    Args:
        vision_config: as for `build_tower`.
        layer, class_token, norm: as for `patch_features`.

    Raises:
        ValueError: if they are no float[N, v, d].
        VisionEncoderError: as `build_tower` and `patch_features`.
    """
    with torch.device("meta"), torch.no_grad():
        tower = build_tower(vision_config).eval()
        pixels = torch.empty(1, 3, *image_size(tower))
        features = patch_features(tower, pixels, layer, class_token=class_token, norm=norm)
    if features.ndim != 3 or len(features) != 1:
        raise ValueError(f"patch_features gives {tuple(features.shape)} for one image, expected (1, v, d)")
    return features.shape[1], features.shape[2]


def deduplicate(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The frames, or other tensors, that differ, and which of them each is.

    float[N, *] -> float[M, *], int[N], so that the first at the second are the frames.
    """
    if len(frames) < 2:
        return frames, torch.zeros(len(frames), dtype=torch.long, device=frames.device)
    frames = frames.contiguous()
    words = frames.flatten(1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[frames.element_size()])
    # Sums of integers do not depend on their order, so that equal frames have equal sums on every device.
    weights = torch.arange(1, words.shape[1] + 1, device=frames.device) * 0x9E3779B97F4A7C1
    sums = torch.stack([(x * weights).sum() for x in words])
    values, which = sums.unique(return_inverse=True)
    everyone = torch.arange(len(frames), device=frames.device)
    first = everyone.new_full(values.shape, len(frames)).scatter_reduce(0, which, everyone, "amin")
    if len(first) < len(frames) and torch.equal(words[first][which], words):
        return frames[first], which
    return frames, everyone


class VisionEncoder(nn.Module):
    """A tower that reads interleaved media.

    While no parameter of it trains, no graph is kept and batch statistics stay as they were loaded.

    Args:
        visual: the tower, as `build_tower` makes it; its tensors keep their names under `visual.`.
        layer: which layer's patches to return, counted from the end.
        class_token: whether the class token stands before them.
        norm: whether the tower's last norm is applied; None: to the last layer only.
    """

    def __init__(
        self, visual: nn.Module, layer: int = -1, *, class_token: bool = False, norm: bool | None = None
    ) -> None:
        super().__init__()
        self.visual = visual
        self.layer = layer
        self.class_token = class_token
        self.norm = norm

    def forward(self, vision_x: Tensor) -> Tensor:
        """float[B, T_img, F, C, H, W] -> float[B, T_img, F, v, d]."""
        pixels = vision_x.flatten(0, 2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trainable):
            features = patch_features(self.visual, pixels, self.layer, class_token=self.class_token, norm=self.norm)
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
