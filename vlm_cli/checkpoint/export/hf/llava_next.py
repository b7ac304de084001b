"""Transformers' LLaVA-NeXT and LLaVA-OneVision: tiles of a canvas, and a learned newline after each row of them."""

from __future__ import annotations

from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.layouts.llava_next import (
    HuggingFaceLLaVANeXT,
    HuggingFaceLLaVANeXTVideo,
    HuggingFaceLLaVAOneVision,
)
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["LLaVANeXTClass", "LLaVANeXTVideoClass", "LLaVAOneVisionClass"]


class LLaVANeXTClass(HFClass):
    """LLaVA-NeXT's class (LLaVA-1.6)."""

    layout: Layout = HuggingFaceLLaVANeXT()
    model = "LlavaNextForConditionalGeneration"
    processor = "LlavaNextProcessor"
    model_type = "llava_next"

    def draft(self, source: Source) -> Draft:
        from transformers import LlavaNextImageProcessor

        strategy = "default" if source.tower.num_before else "full"
        images = LlavaNextImageProcessor(
            size={"shortest_edge": source.tower.image_size},
            crop_size=source.square,
            image_grid_pinpoints=_pinpoints(source),
            **image_settings(source.config),
        )
        return Draft(
            config={**_settings(source, self.model_type, strategy), **self.clip_settings(source)},
            images=images,
            processor={
                "patch_size": source.tower.patch_size,
                "vision_feature_select_strategy": strategy,
                "image_token": MEDIA_TOKEN,
                "num_additional_image_tokens": source.tower.num_before,
            },
            parts=self.more_parts(source),
        )

    def clip_settings(self, source: Source) -> dict[str, Any]:
        """Return the settings of clips."""
        return {}

    def more_parts(self, source: Source) -> dict[str, Any]:
        """Return what the processor has beside its image processor and its tokenizer."""
        return {}


class LLaVANeXTVideoClass(LLaVANeXTClass):
    """LLaVA-NeXT-Video's class: LLaVA-NeXT's parts, which also read clips and pool their patches."""

    layout: Layout = HuggingFaceLLaVANeXTVideo()
    model = "LlavaNextVideoForConditionalGeneration"
    processor = "LlavaNextVideoProcessor"
    model_type = "llava_next_video"

    def clip_settings(self, source: Source) -> dict[str, Any]:
        stride = source.option("tiling", "clip_pool") or 2
        return {"video_token_index": _clip_id(source), "spatial_pool_stride": stride}

    def more_parts(self, source: Source) -> dict[str, Any]:
        from transformers import LlavaNextVideoVideoProcessor

        size, settings = {"shortest_edge": source.tower.image_size}, image_settings(source.config)
        return {"video_processor": LlavaNextVideoVideoProcessor(size=size, crop_size=source.square, **settings)}


class LLaVAOneVisionClass(HFClass):
    """LLaVA-OneVision's class: a tower without a class token, and a limit to the vision tokens of a picture."""

    layout: Layout = HuggingFaceLLaVAOneVision()
    model = "LlavaOnevisionForConditionalGeneration"
    processor = "LlavaOnevisionProcessor"

    def draft(self, source: Source) -> Draft:
        from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor

        strategy = "default" if source.tower.num_before else "full"
        settings, pinpoints = image_settings(source.config), _pinpoints(source)
        ratio = f"anyres_max_{source.option('tiling', 'shrink_beyond') or 9}"
        return Draft(
            config={
                **_settings(source, "llava_onevision", strategy),
                "vision_aspect_ratio": ratio,
                "video_token_index": _clip_id(source),
            },
            images=LlavaOnevisionImageProcessor(size=source.square, image_grid_pinpoints=pinpoints, **settings),
            processor={
                "num_image_tokens": source.num_positions,
                "vision_feature_select_strategy": strategy,
                "vision_aspect_ratio": ratio,
                "image_token": MEDIA_TOKEN,
            },
            parts={"video_processor": LlavaOnevisionVideoProcessor(size=source.square, **settings)},
        )


def _clip_id(source: Source) -> int:
    """Return the id of the token for clips; without one, an id that no tokenizer has: it is read beside clips alone."""
    beyond: int = source.describe("")["text_config"]["vocab_size"]
    return source.config.added_ids.get("<video>", beyond + 1)


def _settings(source: Source, model_type: str, strategy: str) -> dict[str, Any]:
    return {
        **source.describe(model_type),
        "image_token_index": source.config.media_token_id,
        "image_seq_length": source.num_positions,
        "image_grid_pinpoints": _pinpoints(source),
        "vision_feature_layer": source.layer,
        "vision_feature_select_strategy": strategy,
        "multimodal_projector_bias": source.option("vision_tokenizer", "bias", True),
    }


def _pinpoints(source: Source) -> list[list[int]]:
    side = source.tower.image_size
    return [list(x) for x in source.option("tiling", "pinpoints", ((side, side),))]
