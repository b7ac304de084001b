"""Transformers' LLaVA-NeXT and LLaVA-OneVision: tiles of a canvas, and a learned newline after each row of them."""

from __future__ import annotations

from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.layouts.llava_next import HuggingFaceLLaVANeXT, HuggingFaceLLaVAOneVision
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["LLaVANeXTClass", "LLaVAOneVisionClass"]


class LLaVANeXTClass(HFClass):
    """LLaVA-NeXT's class (LLaVA-1.6)."""

    layout: Layout = HuggingFaceLLaVANeXT()
    model = "LlavaNextForConditionalGeneration"
    processor = "LlavaNextProcessor"

    def draft(self, source: Source) -> Draft:
        from transformers import LlavaNextImageProcessor

        side, strategy = source.tower.image_size, "default" if source.tower.num_before else "full"
        pinpoints = _pinpoints(source)
        images = LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size=source.square,
            image_grid_pinpoints=pinpoints,
            **image_settings(source.config),
        )
        return Draft(
            config=_settings(source, "llava_next", strategy),
            images=images,
            processor={
                "patch_size": source.tower.patch_size,
                "vision_feature_select_strategy": strategy,
                "image_token": MEDIA_TOKEN,
                "num_additional_image_tokens": source.tower.num_before,
            },
        )


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
        ids, described = source.config.added_ids, _settings(source, "llava_onevision", strategy)
        # Without a token for clips, an id that no tokenizer has: the class reads it only beside clips.
        clip_id = ids.get("<video>", described["text_config"]["vocab_size"] + 1)
        return Draft(
            config={
                **described,
                "vision_aspect_ratio": ratio,
                "video_token_index": clip_id,
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
