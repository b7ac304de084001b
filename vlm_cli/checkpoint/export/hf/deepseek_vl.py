"""Transformers' `DeepseekVLForConditionalGeneration`: patches of one view, past the last norm, and two linear maps."""

from __future__ import annotations

from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings, make_one_view, soft_token
from vlm_cli.checkpoint.export.hf.towers import NotHeld
from vlm_cli.checkpoint.published.layouts.deepseek_vl import HuggingFaceDeepSeekVL

__all__ = ["DeepSeekVLClass"]


class DeepSeekVLClass(HFClass):
    """DeepSeek-VL's class. Its processor takes an image processor that pads pictures, or one that stretches them."""

    layout = HuggingFaceDeepSeekVL()
    model = "DeepseekVLForConditionalGeneration"
    processor = "DeepseekVLProcessor"
    tower = r"model\.vision_model\."

    def draft(self, source: Source) -> Draft:
        if source.tower.num_before:
            raise NotHeld(
                "vision_encoder has a class token; the class projects every token, and vlm the patches alone."
            )
        token = soft_token(source, "image_token")
        return Draft(
            config={**source.describe("deepseek_vl", token), "image_token_id": token.id},
            images=_make_images(source),
            processor={"num_image_tokens": (source.tower.image_size // source.tower.patch_size) ** 2},
            media_token=token.text,
            named_tokens={"image_token": token.text},
            has_added_rows=token.is_added,
        )


def _make_images(source: Source) -> Any:
    """Return the image processor of a picture that is one view."""
    from transformers import DeepseekVLImageProcessor

    given: Any = source.config.vision_config.get("preprocess") or {}
    if given.get("resize_mode") == "squash":
        return make_one_view(source)
    least = given.get("least_side", 1)
    return DeepseekVLImageProcessor(size=source.square, min_size=least, **image_settings(source.config))
