"""Models of timm as vision encoders, with all that OpenCLIP's own class for timm's models can do.

`timm` holds hundreds of models beside those that OpenCLIP's names use. Tensors keep timm's names, after `trunk.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.encoders.structure import infer_grid
from vlm_cli.timm_sizes import TIMM_SIZES

__all__ = ["TimmEncoder", "build_timm_encoder"]

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")


class TimmEncoder(TimmModel):  # type: ignore[misc]  # OpenCLIP has no types
    """A model of timm without its classifier.

    Args:
        name: of the model, without a tag.
        image_size: (H, W) pixels.
        args: sizes that differ from the model's own, such as `depth`; their names are among `TIMM_SIZES`.
    """

    def __init__(self, name: str, image_size: tuple[int, int], args: Mapping[str, Any] | None = None) -> None:
        nn.Module.__init__(self)  # OpenCLIP's class would choose another pooling, and with it other norms
        self.trunk = timm.create_model(name, pretrained=False, num_classes=0, **(args or {}))
        self.head = nn.Sequential()
        self.image_size = image_size

    def last_patches(self, pixels: Tensor) -> Tensor | None:
        """Return timm's own last features without class tokens, float[N, v, d]; None if they are no grid of patches.

        Some models return their class token alone, or before patches of which timm does not count it.

        Raises:
            VisionEncoderError: if the model has no features of patches at all.
        """
        trunk: Any = self.trunk
        features = trunk.forward_features(pixels)
        if isinstance(features, Tensor) and features.ndim == 4:
            channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
            return (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
        if isinstance(features, Tensor) and features.ndim == 3:
            patches = features[:, getattr(trunk, "num_prefix_tokens", 0) or 0 :]
            if patches.shape[1] > 1 and infer_grid(patches.shape[1], self.image_size) is not None:
                return patches
        if not hasattr(trunk, "forward_intermediates"):
            raise VisionEncoderError("timm's model has no features of patches, but of scales or classes alone.")
        return None


def build_timm_encoder(vision_config: Mapping[str, Any]) -> nn.Module:
    """Build a model of timm with random weights, at timm's own image size.

    Args:
        vision_config: `name`, of the model, `vision_cfg` with `image_size`, and perhaps `args`, sizes that differ from
            the model's own.

    Raises:
        VisionEncoderError: if timm has no model of this name, or `args` holds more than sizes.
    """
    name, size = vision_config["name"], vision_config["vision_cfg"]["image_size"]
    if not _NAME.fullmatch(name) or not timm.is_model(name):
        raise VisionEncoderError(f"timm {timm.__version__} has no model {name[:100]!r}.")
    args = vision_config.get("args", {})
    if more := sorted(set(args) - set(TIMM_SIZES)):
        raise VisionEncoderError(f"timm's model would get {', '.join(more)}; vlm sets only {', '.join(TIMM_SIZES)}.")
    size = (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)
    encoder: nn.Module = TimmEncoder(name, size, args)
    return encoder
