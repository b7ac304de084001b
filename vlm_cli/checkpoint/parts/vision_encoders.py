"""Vision encoders by name: OpenCLIP's, and those of other packages.

A name gives a configuration without a download of weights; the weights follow when `load_tower` asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_cli.checkpoint.parts.hf import check_hf_weights, find_hf_tower, load_hf_tower
from vlm_cli.checkpoint.parts.openclip import (
    check_openclip_weights,
    find_openclip_tower,
    load_openclip_tower,
    openclip_files,
)
from vlm_cli.checkpoint.parts.outside import find_outside_tower, load_outside_tower
from vlm_cli.checkpoint.parts.several import find_several_towers, load_several_towers
from vlm_cli.checkpoint.parts.timm_models import check_timm_weights, find_timm_tower, load_timm_tower
from vlm_cli.checkpoint.parts.tower import SeveralWeights, Tower
from vlm_cli.composition import SeveralEncoderOptions, VisionEncoderOptions
from vlm_cli.errors import PluginError
from vlm_cli.registry import VISION_ENCODERS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_tower_weights", "describe_random_tower", "find_tower", "list_towers", "load_tower"]


def list_towers() -> dict[str, str]:
    """List the names of OpenCLIP and of other packages, with a summary of each. OpenCLIP itself is not imported."""
    return {**dict.fromkeys(openclip_files(), "OpenCLIP"), **VISION_ENCODERS.summaries()}


def find_tower(options: VisionEncoderOptions) -> Tower:
    """Find a tower and its preprocessing. Only `hf:` and `hf-hub:` names read files from the hub, of a few kB.

    Raises:
        UnknownNameError: for a name or tag that neither OpenCLIP nor another package has.
        VisionEncoderError: for a configuration that cannot be read.
        PluginError: if the package that has the name is broken.
    """
    if isinstance(options, SeveralEncoderOptions):
        return find_several_towers(options, find_tower)
    if options.name.startswith("hf:"):
        return find_hf_tower(options)
    if options.name.startswith("timm:"):
        return find_timm_tower(options)
    if options.name not in VISION_ENCODERS:
        return find_openclip_tower(options)
    if options.name in openclip_files():
        raise PluginError(
            f"vision encoder {options.name!r} is a name of OpenCLIP, and an installed package registers it too. "
            "Uninstall that package."
        )
    return find_outside_tower(options)


def describe_random_tower(options: VisionEncoderOptions) -> str | None:
    """Say that a name brings no weights, or that its images are prepared in another way; None if there is no more."""
    name = options.name
    if isinstance(options, SeveralEncoderOptions):
        return " ".join(note for x in options.encoders if (note := describe_random_tower(x))) or None
    if name.startswith(("hf:", "timm:")):
        return " ".join(find_tower(options).notes) or None
    if options.pretrained is not None or name.startswith("hf-hub:") or find_tower(options).weights is not None:
        return None
    pixels = ", and images are prepared with CLIP's mean and std" if "siglip" in name.lower() else ""
    return (
        f"vision encoder {name!r} names no pretrained weights, so its weights are random{pixels}. Give a tag, as in "
        "ViT-B-32:laion2b_s34b_b79k."
    )


def check_tower_weights(tower: Tower) -> None:
    """Check what can be known of a tower's weight file before it is loaded, if it is on this machine.

    Raises:
        VisionEncoderError: if the file cannot be read or does not fit.
    """
    if isinstance(tower.weights, SeveralWeights):
        for one in tower.weights.towers:
            check_tower_weights(one)
        return
    check = {"hf": check_hf_weights, "timm": check_timm_weights}.get(tower.config.get("type", ""))
    if check is not None and tower.weights is not None:
        check(tower)
    elif not tower.is_outside:
        check_openclip_weights(tower)


def load_tower(tower: Tower) -> nn.Module:
    """Make the image tower with its weights, in float32; with random ones if it names none.

    Raises:
        VisionEncoderError: if the weights cannot be fetched or do not fit.
    """
    from vlm_cli.modeling.towers import build_tower

    if tower.weights is None:
        return build_tower(tower.config)
    if isinstance(tower.weights, SeveralWeights):
        return load_several_towers(tower, load_tower)
    load = {"hf": load_hf_tower, "timm": load_timm_tower}.get(tower.config.get("type", ""))
    if load is not None:
        return load(tower)
    return load_outside_tower(tower) if tower.is_outside else load_openclip_tower(tower)
