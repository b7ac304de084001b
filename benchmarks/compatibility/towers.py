"""Every image tower of OpenCLIP: what it declares, what it does, and how its pixels are made.

B batch, T_img media per row, F frames per medium, C H W pixels, v patches, d channels.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn

from vlm_cli.checkpoint.parts.vision_encoders import find_tower, list_towers
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.modeling.towers import build_tower, find_image_size, find_tower_shape
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.registry import VISION_ENCODERS

__all__ = [
    "Check",
    "Ran",
    "TowerRow",
    "check_declared",
    "check_distinct",
    "check_folding",
    "check_pixels",
    "check_preprocessing",
    "check_real",
    "check_tower",
    "materialize",
    "openclip_preprocessing",
    "own_shape",
    "shorten",
    "towers",
]

Ran = Literal["whole", "two layers"]

WHOLE = 130_000_000  # parameters; a larger tower runs with two layers of each stack
LAYERS = (-1, -2)

#: Two orders of summation of the same products in float32: a batched product and a single one may use other kernels.
FOLDING_TOLERANCE = 1e-4  # of the largest feature
#: Different noise gives features that differ by far more than rounding.
DISTINCT = 1e-3  # of the largest feature


@dataclass(frozen=True)
class Check:
    """One comparison: whether it holds, what was measured, and in words what is wrong if it does not."""

    passed: bool
    difference: float = 0.0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class TowerRow:
    """What was found of one tower.

    Attributes:
        kind: class of the tower, that of timm if it is one of timm's.
        image_size: (H, W) pixels.
        patches, channels: v and d of the last layer.
        parameters: of the whole tower, in millions.
        ran: whether all layers ran, or two of each stack of equal ones.
        declared: v and d on the meta device are those that the tower says of itself.
        real: v and d of a real forward are the declared ones, in both layers.
        folding: a batch of media of frames gives what each frame gives alone; relative to the largest feature.
        distinct: different images give different features; relative to the largest feature.
        preprocessing: pixels are those of OpenCLIP without weights, and for each pretrained tag.
        tags: pretrained tags that were compared.
    """

    name: str
    kind: str
    image_size: tuple[int, int]
    patches: int
    channels: int
    parameters: float
    ran: Ran
    declared: Check
    real: Check
    folding: Check
    distinct: Check
    preprocessing: Check
    tags: tuple[str, ...]

    @property
    def checks(self) -> dict[str, Check]:
        names = ("declared", "real", "folding", "distinct", "preprocessing")
        return {name: getattr(self, name) for name in names}

    @property
    def verdict(self) -> bool:
        return all(check.passed for check in self.checks.values())

    @property
    def reason(self) -> str:
        """What is wrong; empty if nothing is."""
        return " ".join(f"{name}: {check.problem}" for name, check in self.checks.items() if not check.passed)


def towers() -> list[str]:
    """Names of all of OpenCLIP's towers; encoders of other packages are theirs to check."""
    return [name for name in list_towers() if name not in VISION_ENCODERS]


def check_tower(name: str) -> TowerRow:
    """Check one tower; an error of OpenCLIP, timm or ours is raised, as no row could tell it better."""
    config = find_tower(VisionEncoderOptions(name=name)).config
    vision = config["vision_cfg"]
    config.pop("preprocess")  # no part of the tower
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        config.pop("quick_gelu")  # only OpenCLIP's own transformers read it
    found = _check_config(json.dumps(config, sort_keys=True))
    tags = tuple(list_pretrained_tags_by_model(name))
    return TowerRow(name=name, tags=tags, preprocessing=check_preprocessing(name, tags, found["image_size"]), **found)


@cache
def _check_config(text: str) -> dict[str, Any]:
    """All of a row that follows from the configuration, which several names may share."""
    config = json.loads(text)
    declared = {layer: find_tower_shape(config, layer) for layer in LAYERS}
    with torch.device("meta"):
        tower = build_tower(config)
    kind, parameters = _kind(tower), sum(p.numel() for p in tower.parameters())
    torch.manual_seed(zlib.crc32(text.encode()))
    ran: Ran = "whole" if parameters <= WHOLE else "two layers"
    # Real initialisation where it is quick; OpenCLIP's own transformers take several times as long as timm's.
    if ran == "whole" and (hasattr(tower, "trunk") or parameters < WHOLE / 3):
        tower = build_tower(config)
    else:
        tower = materialize(tower if ran == "whole" else shorten(tower))
    tower.eval()
    pixels = torch.randn(2, 1, 2, 3, *find_image_size(tower))
    encoder = VisionEncoder(tower)
    with torch.inference_mode():
        folded = encoder(pixels)
        # The first and the last frame: folded wrongly, one of them would stand elsewhere.
        alone = torch.stack([encoder(pixels[b : b + 1, :, f : f + 1])[0, 0, 0] for b, f in ((0, 0), (1, 1))])
        before = VisionEncoder(tower, -2)(pixels[:1, :, :1])
    v, d = declared[-1]
    return {
        "kind": kind,
        "image_size": find_image_size(tower),
        "patches": v,
        "channels": d,
        "parameters": parameters / 1e6,
        "ran": ran,
        "declared": check_declared(declared, own_shape(tower)),
        "real": check_real({-1: folded, -2: before}, declared),
        "folding": check_folding(folded.flatten(0, 2)[[0, -1]], alone),
        "distinct": check_distinct(alone),
    }


def _kind(tower: nn.Module) -> str:
    trunk = getattr(tower, "trunk", None)
    return type(tower).__name__ if trunk is None else f"timm {type(trunk).__name__}"


# -- towers without their weights ------------------------------------------------------------------------------------


def shorten(tower: nn.Module, most: int = 2) -> nn.Module:
    """Cut every stack of equal blocks; widths, image size and patches stay.

    The first block of a stack may also change the width, so it is those after it that must be equal. Stages, which
    differ in width, are not cut; their blocks are.
    """
    for module in list(tower.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > most and _are_repeated(child):
                setattr(module, name, child[:most])
    return tower


def _are_repeated(blocks: nn.Module) -> bool:
    first, second, *others = blocks.children()
    shapes = _shapes(second)
    is_block = any(True for _ in second.children())  # branches and single layers are counted by their owners
    return is_block and type(first) is type(second) and all(_shapes(block) == shapes for block in others)


def _shapes(module: nn.Module) -> list[Any]:
    return [type(module), *((name, p.shape) for name, p in module.named_parameters())]


@torch.no_grad()
def materialize(tower: nn.Module) -> nn.Module:
    """Give a tower of the meta device memory, random weights that keep the scale of features, and its buffers."""
    tower.to_empty(device="cpu")
    for buffer in tower.buffers():
        # Nothing that was missed below may look like a value.
        buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    for name, parameter in tower.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(1 if name.endswith(("weight", "gamma")) else 0, 0.1)
    return tower


# -- comparisons -----------------------------------------------------------------------------------------------------


def own_shape(tower: nn.Module) -> tuple[int, int]:
    """(v patches, d channels) of the last layer by what a tower says of itself, without a forward."""
    height, width = find_image_size(tower)
    trunk = getattr(tower, "trunk", None)
    if trunk is None and hasattr(tower, "attnpool"):  # ModifiedResNet
        return len(tower.attnpool.positional_embedding) - 1, tower.attnpool.k_proj.in_features
    if trunk is None:
        rows, columns = tower.grid_size
        return rows * columns, tower.conv1.out_channels
    if hasattr(getattr(trunk, "patch_embed", None), "num_patches") and not hasattr(trunk, "layers"):
        return trunk.patch_embed.num_patches, trunk.num_features
    stride = trunk.feature_info[-1]["reduction"]  # ConvNeXt, FastViT, Swin
    return (height // stride) * (width // stride), trunk.num_features


def check_declared(declared: Mapping[int, tuple[int, int]], own: tuple[int, int]) -> Check:
    """The last layer has the shape that the tower says of itself, and the one before has patches too."""
    wrong = [f"layer {layer} has no features." for layer, shape in declared.items() if min(shape) < 1]
    if declared[-1] != own:
        wrong.append(f"{declared[-1]} is declared as patches and channels, and the tower itself says {own}.")
    return Check(not wrong, problem=" ".join(wrong))


def check_real(features: Mapping[int, Tensor], declared: Mapping[int, tuple[int, int]]) -> Check:
    """Features float[B, T_img, F, v, d] of each layer are finite, and of the declared size."""
    wrong = []
    for layer, (v, d) in declared.items():
        found = features[layer]
        if found.shape[3:] != (v, d):
            wrong.append(f"layer {layer} declares {v} patches of {d} channels and gives {tuple(found.shape[3:])}.")
        if not found.isfinite().all():
            wrong.append(f"layer {layer} gives values that are not finite.")
    return Check(not wrong, problem=" ".join(wrong))


def check_folding(folded: Tensor, alone: Tensor) -> Check:
    """float[N, v, d] of frames in a batch of media are float[N, v, d] of the same frames, each run alone."""
    difference = _relative(folded - alone, alone)
    return Check(
        difference <= FOLDING_TOLERANCE, difference, f"frames differ from themselves alone by {difference:.1e}."
    )


def check_distinct(alone: Tensor) -> Check:
    """Of float[N, v, d] no two images look alike; otherwise the comparison of frames says nothing."""
    pairs = [alone[i] - alone[k] for i in range(len(alone)) for k in range(i)]
    difference = min(_relative(pair, alone) for pair in pairs)
    return Check(difference >= DISTINCT, difference, f"different images give features that differ by {difference:.1e}.")


@cache
def photo() -> Image.Image:
    """A picture with edges and slopes, which is not square."""
    size = (301, 203)
    bands = (
        Image.effect_mandelbrot(size, (-2, -1.3, 1, 1.3), 100),
        Image.linear_gradient("L"),
        Image.radial_gradient("L"),
    )
    return Image.merge("RGB", [band.resize(size) for band in bands])


def check_preprocessing(name: str, tags: tuple[str, ...], size: tuple[int, int]) -> Check:
    """Pixels for a tower that reads (H, W) = `size`, without weights and with those of each tag, are OpenCLIP's."""
    worst = Check(True)
    for tag in (None, *tags):
        ours = find_tower(VisionEncoderOptions(name=name, pretrained=tag)).config
        check = check_pixels(ours["preprocess"], openclip_preprocessing(name, tag, size))
        if not check.passed:
            return Check(False, check.difference, f"{tag or 'without weights'}: {check.problem}")
        worst = max(worst, check, key=lambda x: x.difference)
    return worst


def openclip_preprocessing(name: str, tag: str | None, size: tuple[int, int]) -> dict[str, Any]:
    """What `open_clip.create_model` writes on a tower that reads (H, W) = `size`, without building the model."""
    of_tag = get_pretrained_cfg(name, tag) if tag else {}
    return merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), of_tag), {"size": size})


def check_pixels(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Check:
    """A picture prepared by our image processor, and by OpenCLIP's transform: equal to the last bit."""
    return _check_pixels(json.dumps(ours, sort_keys=True), json.dumps(theirs, sort_keys=True))


@cache
def _check_pixels(ours: str, theirs: str) -> Check:
    found = OpenCLIPImageProcessor(json.loads(ours))([[[photo()]]])["pixel_values"][0, 0, 0]
    expected = image_transform_v2(PreprocessCfg(**json.loads(theirs)), is_train=False)(photo())
    if found.shape != expected.shape:
        return Check(False, problem=f"pixels are {tuple(found.shape)} and OpenCLIP's {tuple(expected.shape)}.")
    difference = float((found - expected).abs().max())
    return Check(difference == 0, difference, f"pixels differ from OpenCLIP's by {difference:.2e}.")


def _relative(difference: Tensor, scale: Tensor) -> float:
    return float(difference.abs().max() / scale.abs().max())
