"""Image towers of OpenCLIP, and vision encoders of other packages, behind the same few functions.

N images, C H W pixels, v patches, d channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.encoders.structure import infer_grid
from vlm_cli.modeling.meta import meta_device
from vlm_cli.registry import encoder_type

__all__ = [
    "Layers",
    "build_tower",
    "find_channels",
    "find_grid",
    "find_image_size",
    "find_stack",
    "find_tower_shape",
    "measure_features",
]
__all__ += ["patch_features", "set_image_size", "truncate_layers"]


#: A layer, counted from the end, or several.
Layers = int | tuple[int, ...]


def build_tower(vision_config: Mapping[str, Any]) -> nn.Module:
    """Build a vision encoder with random weights. Of OpenCLIP's models only the image tower is built.

    An encoder of another package is a module that is built as `Encoder(vision_config)` and has

        configure(options) -> dict               a class method; returns plain data, whose `vision_cfg` has `image_size`
        image_size                               pixels, or (H, W)
        patch_features(pixels, layer) -> Tensor  as the function of this module
        load_pretrained(name_or_file)            only if the encoder has weights to load

    Its options are a subclass of `VisionEncoderOptions`.

    Args:
        vision_config: either `embed_dim`, `vision_cfg` and `quick_gelu` as in OpenCLIP's model configurations, and
            `depth` to keep fewer layers; or `type`, a name of `ENCODER_TYPES` with what its builder reads, or a name of
            `VISION_ENCODERS` with what its `configure` returned.

    Raises:
        VisionEncoderError: if the tower does not have `depth` layers.
    """
    if "type" in vision_config:
        encoder: nn.Module = encoder_type(vision_config["type"]).load()(vision_config)
        if hasattr(encoder, "patch_features"):
            return encoder
        return truncate_layers(set_image_size(encoder), vision_config.get("depth"))
    trunk = vision_config["vision_cfg"].get("timm_model_name")
    if trunk is not None and (not isinstance(trunk, str) or ":" in trunk or "/" in trunk):
        raise VisionEncoderError(
            f"timm_model_name is {str(trunk)[:80]!r}, and may only be a name that timm itself has: a configuration "
            "does not make vlm fetch a model or read a folder."
        )
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    # Otherwise timm would download ImageNet weights.
    vision_cfg = CLIPVisionCfg(**{**vision_config["vision_cfg"], "timm_model_pretrained": False})
    tower = _build_vision_tower(vision_config["embed_dim"], vision_cfg, vision_config.get("quick_gelu", False))
    if hasattr(tower, "trunk") and vision_cfg.act_kwargs:
        _set_gelu(tower.trunk, **vision_cfg.act_kwargs)
    return truncate_layers(set_image_size(tower), vision_config.get("depth"))


def _set_gelu(trunk: nn.Module, approximate: str) -> None:
    """Set the GELU of a timm model. OpenCLIP leaves timm's default, but SigLIP was trained with "tanh"."""
    for module in trunk.modules():
        if isinstance(module, nn.GELU):
            module.approximate = approximate


def truncate_layers(tower: nn.Module, depth: int | None) -> nn.Module:
    """Keep the first `depth` layers of OpenCLIP's or timm's vision transformer, in place; None keeps all.

    Raises:
        VisionEncoderError: if the tower is not a single stack of layers, or has fewer than `depth`.
    """
    if depth is None:
        return tower
    stack = find_stack(tower)
    if stack is None:
        raise VisionEncoderError("the tower is no single stack of layers that could be cut; leave out depth.")
    owner, name = stack
    layers = getattr(owner, name)
    if depth > len(layers):
        raise VisionEncoderError(f"the tower has {len(layers)} layers, so depth can be at most {len(layers)}.")
    setattr(owner, name, layers[:depth])
    return tower


def find_stack(tower: Any) -> tuple[nn.Module, str] | None:
    """Return the module that holds a vision transformer's layers and the layers' name in it; None for other towers."""
    if hasattr(tower, "patch_features"):
        return None
    if hasattr(getattr(tower, "transformer", None), "resblocks"):
        return tower.transformer, "resblocks"
    trunk: Any = getattr(tower, "trunk", None)
    # In timm's convolutional trunks, `blocks` are stages of different widths. Those trunks have no prefix tokens.
    return (trunk, "blocks") if hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens") else None


def _has_class_token(tower: Any) -> bool:
    """Say whether a vision transformer has a class token."""
    owner, name = (tower.trunk, "cls_token") if hasattr(tower, "trunk") else (tower, "class_embedding")
    return getattr(owner, name, None) is not None


def _has_norm(tower: Any) -> bool:
    """Say whether a tower's last norm applies to patches; in CoCa, and as timm's `fc_norm`, it follows pooling."""
    owner, name = (tower.trunk, "norm") if hasattr(tower, "trunk") else (tower, "ln_post")
    has_norm = not isinstance(getattr(owner, name, None), (nn.Identity, type(None)))
    return has_norm and getattr(tower, "attn_pool", None) is None


def set_image_size(tower: Any) -> nn.Module:
    """Fit a timm model to the `image_size` that its tower declares; OpenCLIP builds it at timm's own size."""
    trunk = getattr(tower, "trunk", None)
    own_size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if hasattr(trunk, "set_input_size") and own_size != tower.image_size:
        tower.set_input_size(tower.image_size)
    return tower


def patch_features(
    tower: Any, pixels: Tensor, layer: Layers = -1, *, class_token: bool = False, norm: bool | None = None
) -> Tensor:
    """Return the features of each patch, without register tokens, before pooling and projection.

    Args:
        tower: an OpenCLIP VisionTransformer, ModifiedResNet or TimmModel, or a module with a method `patch_features`.
        pixels: float[N, C, H, W], normalised as the tower expects.
        layer: counted from the end: -1 is the last layer, -2 the layer before it. Of several, the channels are
            concatenated in the given order.
        class_token: put the class token before the patches.
        norm: apply the tower's last norm; None applies it to the last layer only.

    Returns:
        float[N, v, d]; v includes the class token.

    Raises:
        VisionEncoderError: if `class_token` or `norm` is given and the tower has no class token or no such norm.
    """
    if isinstance(layer, tuple):
        return _concatenate_layers(tower, pixels, layer, class_token, norm)
    if (own := getattr(tower, "patch_features", None)) is not None:
        if getattr(tower, "has_feature_settings", False):
            return own(pixels, layer, class_token=class_token, norm=norm)
        if class_token or norm is not None:
            raise VisionEncoderError("class_token and norm are settings of OpenCLIP's towers; leave them out.")
        return own(pixels, layer)
    if class_token and not (find_stack(tower) and _has_class_token(tower)):
        raise VisionEncoderError("the tower has no class token; leave out class_token.")
    if norm is not None and not (find_stack(tower) and _has_norm(tower)):
        raise VisionEncoderError("the tower has no last norm of its patches that could be chosen; leave out norm.")
    trunk = getattr(tower, "trunk", None)
    own_last = getattr(tower, "last_patches", None)
    if own_last is not None and layer == -1 and norm is not False and not class_token:
        if (patches := own_last(pixels)) is not None:
            return patches
    elif trunk is not None and layer == -1 and norm is not False:
        # timm's own way: `forward_intermediates` would skip FastViT's last convolution.
        features = trunk.forward_features(pixels)
        if features.ndim == 3:
            patches = features[:, getattr(trunk, "num_prefix_tokens", 0) or 0 :]
            return torch.cat([features[:, :1], patches], dim=1) if class_token else patches
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    # In CoCa's towers the last norm has the width of the pooler, so that it does not fit patches.
    applies = layer == -1 and getattr(tower, "attn_pool", None) is None if norm is None else norm
    return _read_layers(tower, pixels, -layer, class_token, norm=applies)[0]


def _read_layers(
    tower: Any, pixels: Tensor, indices: int | list[int], class_token: bool, *, norm: bool
) -> list[Tensor]:
    """Return float[N, v, d] of each of OpenCLIP's or timm's layers in `indices`, which may count the last ones."""
    found = tower.forward_intermediates(
        pixels,
        indices=indices,
        normalize_intermediates=norm,
        intermediates_only=True,
        output_extra_tokens=class_token,
    )
    features = [x.flatten(2).transpose(1, 2) for x in found["image_intermediates"]]
    if class_token:
        prefixes = found["image_intermediates_prefix"]
        return [torch.cat([prefix[:, :1], x], dim=1) for prefix, x in zip(prefixes, features, strict=True)]
    return features


def _concatenate_layers(
    tower: Any, pixels: Tensor, layers: tuple[int, ...], class_token: bool, norm: bool | None
) -> Tensor:
    """Return float[N, v, k·d], the features of k layers. The tower runs once for those that pass no last norm."""
    found: dict[int, Tensor] = {}
    plain = sorted({x for x in layers if x != -1} if norm is None else set(layers) if not norm else set())
    if hasattr(tower, "plain_layers"):
        found = tower.plain_layers(pixels, plain, class_token=class_token)
    elif len(plain) > 1 and find_stack(tower) is not None and not (class_token and not _has_class_token(tower)):
        found = dict(zip(plain, _read_layers(tower, pixels, plain, class_token, norm=False), strict=True))
    for x in sorted(set(layers) - found.keys()):
        found[x] = patch_features(tower, pixels, x, class_token=class_token, norm=norm)
    if len({x.shape[1] for x in found.values()}) > 1:
        sizes = ", ".join(f"{layer}: {x.shape[1]}" for layer, x in found.items())
        raise VisionEncoderError(f"the layers have different numbers of patches ({sizes}), so they do not concatenate.")
    return torch.cat([found[layer] for layer in layers], dim=-1)


def find_image_size(tower: nn.Module) -> tuple[int, int]:
    """Return the (H, W) pixels that a tower reads."""
    size: Any = getattr(tower, "pixel_size", None) or tower.image_size
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def find_grid(vision_config: Mapping[str, Any], num_patches: int, class_token: bool = False) -> tuple[int, int] | None:
    """Return the (rows, columns) in which the patches of a tower's features stand; None if they form no grid.

    Args:
        vision_config: as for `build_tower`.
        num_patches: v, with the class token if the features begin with it.
        class_token: whether they do.
    """
    if "grid" in vision_config:
        rows, columns = vision_config["grid"]
        return rows, columns
    size, patch = (vision_config["vision_cfg"].get(key, default) for key, default in _OPENCLIP_SIZES.items())
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if isinstance(patch, (list, tuple)):
        grid = height // patch[0], width // patch[1]
        return grid if grid[0] * grid[1] == num_patches - class_token else None
    return infer_grid(num_patches - class_token, (height, width))


#: OpenCLIP's defaults.
_OPENCLIP_SIZES = {"image_size": 224, "patch_size": 16}


def find_channels(tower: nn.Module) -> int:
    """Return the channels of the pixels that a tower reads: 3, and 3 for each of several encoders."""
    return int(getattr(tower, "num_channels", 3)) if hasattr(tower, "encoders") else 3


def find_tower_shape(
    vision_config: Mapping[str, Any], layer: Layers = -1, *, class_token: bool = False, norm: bool | None = None
) -> tuple[int, int]:
    """Return (v patches, d channels) of a tower's features for one image, without allocating weights.

    Args:
        vision_config: as for `build_tower`.
        layer, class_token, norm: as for `patch_features`.

    Raises:
        ValueError: if the tower's features are not float[1, v, d].
        VisionEncoderError: as in `build_tower` and `patch_features`.
    """
    with meta_device():
        tower = build_tower(vision_config).eval()
    return measure_features(tower, layer, class_token=class_token, norm=norm)


def measure_features(
    tower: nn.Module, layer: Layers = -1, *, class_token: bool = False, norm: bool | None = None
) -> tuple[int, int]:
    """Return (v patches, d channels) of the features of a tower on the meta device; the tower loses layers.

    Args:
        tower: as for `patch_features`.
        layer, class_token, norm: as for `patch_features`.

    Raises:
        ValueError: if the tower's features are not float[1, v, d].
        VisionEncoderError: as in `patch_features`.
    """
    least = -min(layer) if isinstance(layer, tuple) else -layer
    if (stack := find_stack(tower)) is not None and least <= len(layers := getattr(*stack)) and _are_alike(layers):
        setattr(*stack, layers[:least])
    with meta_device(), torch.no_grad():
        pixels = torch.empty(1, find_channels(tower), *find_image_size(tower))
        features = patch_features(tower, pixels, layer, class_token=class_token, norm=norm)
    if features.ndim != 3 or len(features) != 1:
        raise ValueError(f"patch_features gives {tuple(features.shape)} for one image, expected (1, v, d)")
    return features.shape[1], features.shape[2]


def _are_alike(layers: Iterable[nn.Module]) -> bool:
    """Say whether layers have weights of the same shapes, so that the features after any two have one shape."""
    return len({tuple((name, x.shape) for name, x in layer.named_parameters()) for layer in layers}) <= 1
