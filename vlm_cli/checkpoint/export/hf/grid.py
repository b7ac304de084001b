"""Transformers' classes that cut a picture into a grid of tiles: InternVL, Qianfan-OCR, Cohere2 Vision and Aya Vision.

Each tile passes a pixel shuffle and two linear maps. The token of a vision token is the tokenizer's own, or `<image>`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, SoftToken, Source, image_settings, soft_token, split_text
from vlm_cli.checkpoint.export.hf.towers import STAND_IN, NotHeld
from vlm_cli.checkpoint.published.layouts.aya_vision import HuggingFaceAyaVision
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.layouts.cohere2_vision import HuggingFaceCohere2Vision
from vlm_cli.checkpoint.published.layouts.internvl import HuggingFaceInternVL
from vlm_cli.checkpoint.published.layouts.qianfan_ocr import HuggingFaceQianfanOCR
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["AyaVisionClass", "Cohere2VisionClass", "InternVLClass", "QianfanOCRClass"]


class InternVLClass(HFClass):
    """InternVL's class."""

    layout: Layout = HuggingFaceInternVL()
    model = "InternVLForConditionalGeneration"
    processor = "InternVLProcessor"
    model_type = "internvl"
    #: The only type of vision encoder of which the class makes its own.
    vision = "internvl_vision"
    stand_in = replace(STAND_IN, config={**STAND_IN.config, "model_type": vision}, num_before=1, has_class_token=True)

    def draft(self, source: Source) -> Draft:
        from transformers import GotOcr2ImageProcessor

        tower = self._find_tower(source)
        token = soft_token(source, "context_image_token")
        begin, end = split_text(source, "picture_text", "{views}")
        source.check_tokens(begin, end)
        factor, num_positions = _shuffle(source)
        return Draft(
            config={
                **source.describe(self.model_type, token),
                "vision_config": tower,
                "image_token_id": token.id,
                "image_seq_length": num_positions,
                "downsample_ratio": 1 / factor,
                "vision_feature_layer": source.layer,
            },
            images=GotOcr2ImageProcessor(crop_to_patches=True, **_limits(source)),
            processor={"image_seq_length": num_positions},
            named_tokens={
                "start_image_token": begin,
                "end_image_token": end,
                "context_image_token": token.text,
                **self.name_clip_token(source, end),
            },
            has_added_rows=token.is_added,
            **self.more(source, token),
        )

    def _find_tower(self, source: Source) -> dict[str, Any]:
        """Return the configuration of the vision encoder under the class's own type.

        Raises:
            NotHeld: if it is of another type.
        """
        kinds = {"internvl_vision", self.vision}  # the same encoder under another name
        if (kind := source.tower.config["model_type"]) not in kinds:
            raise NotHeld(f"vision_encoder is of type {kind}; the class has {self.vision}.")
        return {**source.tower.config, "model_type": self.vision}

    def name_clip_token(self, source: Source, end: str) -> dict[str, str]:
        """Name the token of a clip, which the class looks for in each prompt; else one that no prompt holds yet."""
        return {"video_token": source.named_token("video_token", end)}

    def more(self, source: Source, token: SoftToken) -> dict[str, Any]:
        """Return what a draft has beside these settings."""
        from transformers import InternVLVideoProcessor

        video = InternVLVideoProcessor(size=source.square, **image_settings(source.config))
        return {"media_token": token.text, "parts": {"video_processor": video}}


class QianfanOCRClass(InternVLClass):
    """Qianfan-OCR's class: InternVL's parts, which read no clips. A prompt has `<image>` for a picture."""

    layout: Layout = HuggingFaceQianfanOCR()
    model = "QianfanOCRForConditionalGeneration"
    processor = "QianfanOCRProcessor"
    model_type = "qianfan_ocr"
    vision = "qianfan_ocr_vision"

    def name_clip_token(self, source: Source, end: str) -> dict[str, str]:
        return {}

    def more(self, source: Source, token: SoftToken) -> dict[str, Any]:
        return {}


class Cohere2VisionClass(HFClass):
    """Cohere2 Vision's class: a SwiGLU, and a token behind each tile."""

    layout = HuggingFaceCohere2Vision()
    model = "Cohere2VisionForConditionalGeneration"
    processor = "Cohere2VisionProcessor"

    def draft(self, source: Source) -> Draft:
        from transformers import Cohere2VisionImageProcessor

        token = soft_token(source, "image_token")
        begin, end = split_text(source, "picture_text", "{views}")
        _, line_break = split_text(source, "tile_text", "{image}")
        source.check_tokens(begin, end, line_break)
        factor, num_positions = _shuffle(source)
        return Draft(
            config={
                **source.describe("cohere2_vision", token),
                "image_token_id": token.id,
                "downsample_factor": factor,
                "alignment_intermediate_size": 2 * _hidden(source),
            },
            images=Cohere2VisionImageProcessor(
                crop_to_patches=True, patch_size=round(num_positions**0.5), **_limits(source)
            ),
            media_token=token.text,
            named_tokens={
                "boi_token": begin,
                "eoi_token": end,
                "image_token": token.text,
                "img_line_break_token": line_break,
            },
            has_added_rows=token.is_added,
        )


class AyaVisionClass(HFClass):
    """Aya Vision's class: a norm and a SwiGLU, and the number of a tile before it. A prompt has `<image>`."""

    layout = HuggingFaceAyaVision()
    model = "AyaVisionForConditionalGeneration"
    processor = "AyaVisionProcessor"

    def draft(self, source: Source) -> Draft:
        from transformers import GotOcr2ImageProcessor

        token = soft_token(source, "img_patch_token", "<|IMG_PATCH|>")
        begin, end = split_text(source, "picture_text", "{views}")
        factor, _ = _shuffle(source)
        side = source.tower.image_size
        return Draft(
            config={
                **source.describe("aya_vision", token),
                "image_token_index": token.id,
                "downsample_factor": factor,
                "alignment_intermediate_size": 2 * _hidden(source),
                "adapter_layer_norm_eps": source.option("vision_tokenizer", "norm_eps", 1e-6),
                "vision_feature_layer": source.layer,
                "vision_feature_select_strategy": "full",
            },
            images=GotOcr2ImageProcessor(crop_to_patches=True, **_limits(source)),
            processor={
                "patch_size": source.tower.patch_size * factor,
                "img_size": side,
                "image_token": MEDIA_TOKEN,
                "img_patch_token": token.text,
                "start_of_img_token": begin,
                "end_of_img_token": end,
                "tile_token": split_text(source, "tile_text", "_{number}{image}")[0],
                "tile_global_token": split_text(source, "thumbnail_text", "{image}")[0],
            },
            has_added_rows=token.is_added,
        )


def _shuffle(source: Source) -> tuple[int, int]:
    """Return the factor of the pixel shuffle, and the vision tokens of a tile."""
    factor = int(source.option("vision_tokenizer", "pixel_shuffle", 2))
    return factor, (source.tower.image_size // source.tower.patch_size // factor) ** 2


def _limits(source: Source) -> dict[str, Any]:
    """Return the settings of an image processor that cuts a grid of tiles."""
    most = 12 if source.config.composition.tiling.type == "grid" else 1
    return {
        "size": source.square,
        "min_patches": source.option("tiling", "min_tiles", 1),
        "max_patches": source.option("tiling", "max_tiles") or most,
        **image_settings(source.config),
    }


def _hidden(source: Source) -> int:
    """Return the channels between the two maps, half of which the class counts for the gate."""
    return int(source.option("vision_tokenizer", "dim_hidden") or source.text_config.get("hidden_size", 32))
