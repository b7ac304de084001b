"""Vision encoders of other packages, which an entry point registers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.parts.openclip import complete_preprocessing
from vlm_cli.checkpoint.parts.tower import OutsideWeights, Tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import PluginError, UnknownNameError, VisionEncoderError, VLMError, first_line
from vlm_cli.registry import VISION_ENCODERS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["find_outside_tower", "load_outside_tower"]


def find_outside_tower(options: VisionEncoderOptions) -> Tower:
    """Find an encoder of another package: its class configures itself.

    Raises:
        VisionEncoderError: for settings that only OpenCLIP's towers have.
        UnknownNameError: for pretrained weights, if the encoder has none.
        PluginError: if the package is broken.
    """
    name = options.name
    if settings := options.openclip_settings:
        raise VisionEncoderError(
            f"vision encoder {name!r} is of another package, and {' and '.join(settings)} are settings of "
            "OpenCLIP's towers. Leave them out."
        )
    encoder = VISION_ENCODERS[name].load()
    if options.pretrained is not None and not hasattr(encoder, "load_pretrained"):
        raise UnknownNameError(
            f"vision encoder {name!r} has no pretrained weights, so pretrained={options.pretrained!r} means nothing to "
            "it. Leave it out; `vlm build OUT … --weights FILE` loads trained weights of a whole model."
        )
    try:
        # config.json will hold this configuration, and turns tuples into lists.
        config = json.loads(json.dumps(encoder.configure(options)))
        given, size = config.get("preprocess", {}), config["vision_cfg"]["image_size"]
        preprocess = complete_preprocessing({**given, "size": size})
        if unknown := sorted(given.keys() - preprocess.keys()):  # OpenCLIP would ignore unknown keys
            raise ValueError(f"preprocess has {unknown[0]!r}, and may have {', '.join(preprocess)}")
    except VLMError:
        raise
    except Exception as error:
        raise PluginError(
            f"{encoder.__name__}.configure gives no configuration of the vision encoder {name!r}: "
            f"{type(error).__name__}: {first_line(error)}. It must return plain data with vision_cfg.image_size."
        ) from error
    weights = None if options.pretrained is None else OutsideWeights(str(Path(os.path.expanduser(options.pretrained))))
    return Tower({**config, "type": name, "preprocess": preprocess}, {}, weights)


def load_outside_tower(tower: Tower) -> nn.Module:
    """Make an encoder of another package, and let it load its weights.

    Raises:
        VisionEncoderError: if it cannot load them.
    """
    from vlm_cli.modeling.towers import build_tower

    assert isinstance(tower.weights, OutsideWeights)
    visual: Any = build_tower(tower.config)
    try:
        visual.load_pretrained(tower.weights.argument)
    except VLMError:
        raise
    except Exception as error:
        raise VisionEncoderError(
            f"vision encoder {tower.config['type']!r} cannot load the weights {tower.weights.argument!r}: "
            f"{type(error).__name__}: {first_line(error)}."
        ) from None
    encoder: nn.Module = visual.float()
    return encoder
