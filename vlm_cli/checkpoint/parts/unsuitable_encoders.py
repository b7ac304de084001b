"""Why a model of Transformers that reads images cannot be a vision encoder: the one home of these reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["UNREADABLE_HALVES", "UNSUITABLE_ENCODERS", "explain_unsuitable"]

_DETECTOR = "it detects objects, and its output is one token per object"
_OWN_GRID = "it reads patches of images of any size, and takes their grid as another argument"
_CLIPS = "it reads clips, and no single image"
_OTHER_INPUT = "it takes features of another part, and no image"
_CODES = "it turns images into codes"
_NO_ENCODER = "its language model reads patches of pixels through one projection, without a vision encoder"
_TWO_STACKS = "it puts one encoder behind another, and its tokens are not those of one grid"
_NUMBERED = "it reads patches that bring their row and column, and no image"
_WITH_TEXT = "it reads images and text together"

#: Type -> why it cannot be a vision encoder. Types whose class needs more than an image are found by that.
UNSUITABLE_ENCODERS: dict[str, str] = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"), _DETECTOR),
    **dict.fromkeys(
        (
            *("minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision", "molmo2_vision"),
            *("paddleocr_vl_vision", "phi4_multimodal_vision"),
        ),
        _OWN_GRID,
    ),
    **dict.fromkeys(
        ("timesformer", "videomae", "videoprism_vision_model", "vivit", "vjepa2", "xclip_vision_model"), _CLIPS
    ),
    **dict.fromkeys(
        ("lw_detr_vit", "rf_detr_dinov2", "unlimited_ocr_vision_encoder", "vision-encoder-decoder", "vitpose_backbone"),
        _OTHER_INPUT,
    ),
    **dict.fromkeys(("kosmos_2_5_vision_model", "pix2struct_vision_model"), _NUMBERED),
    **dict.fromkeys(("groupvit_vision_model", "mgp-str"), "it gathers patches into groups, which form no grid"),
    **dict.fromkeys(("apertus1p5_vision_tokenizer", "chameleon", "emu3"), _CODES),
    **dict.fromkeys(("fuyu", "gemma4_unified"), _NO_ENCODER),
    **dict.fromkeys(("deepseek_ocr2_vision", "unlimited_ocr_vision"), _TWO_STACKS),
    **dict.fromkeys(("llama4_vision_model", "step3p5_vision"), "it merges neighbouring patches behind its layers"),
    "bridgetower_vision_model": "it gives the features of all its layers at once",
    "seggpt": "it compares two images",
    "sam3_video": "it follows objects through a clip",
    "udop": _WITH_TEXT,
    "evolla": "it reads proteins",
    "inkling_vision": "it reads patches apart, and none sees another",
    "timm_backbone": "it wraps a model of timm; write timm:NAME",
    "vit_mae": "it hides three quarters of the patches at random; the same weights load as a ViT",
    "dinat": "it needs the package natten",
    "dinov3_convnext": "it puts the mean of the patches before them; write timm:convnext_tiny.dinov3_lvd1689m",
    "depth_pro": "it cuts an image into patches of three sizes itself",
    "edgetam_vision_model": "its default settings name no model of timm",
    "mllama_vision_model": "it reads the tiles of a picture together; vlm imports it with the model around it",
    "levit": "its stages have grids that are rounded up, and its tokens do not say so; write timm:levit_128",
}


#: Type of a larger model -> why its vision half cannot be taken, which alone could be a vision encoder.
UNREADABLE_HALVES: dict[str, str] = dict.fromkeys(
    ("mistral_large4", "nemotron_h_omni", "qianfan_ocr"), "the files of the whole model name its tensors in another way"
)


def explain_unsuitable(config: PreTrainedConfig) -> str | None:
    """Say why no model of a configuration can be a vision encoder; None if nothing is known against it."""
    from vlm_cli.trust import list_arguments, list_model_classes, name_pixels

    if reason := UNSUITABLE_ENCODERS.get(config.model_type):
        return reason
    classes = list_model_classes(config)
    if not classes or any(name_pixels(x) is not None for x in classes):
        return None
    first, *others = list_arguments(classes[0])
    needed = [name for name, is_needed in others if is_needed]
    if any(word in name for word in ("grid", "spatial", "position") for name in needed):
        return _OWN_GRID
    if first[0].startswith(("pixel_values", "hidden_states")) and needed:
        return f"it needs {', '.join(needed)} beside an image"
    return None
