"""Transformers' `InternVLForConditionalGeneration`: a grid of tiles, a pixel shuffle, a norm and two linear maps."""

from __future__ import annotations

from dataclasses import replace

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings, soft_token
from vlm_cli.checkpoint.export.hf.towers import STAND_IN, NotHeld
from vlm_cli.checkpoint.published.layouts.internvl import HuggingFaceInternVL

__all__ = ["InternVLClass"]

#: The only type of vision encoder of which the class makes its own.
_VISION = "internvl_vision"


class InternVLClass(HFClass):
    """InternVL's class. The token of a vision token is the tokenizer's own, or `<image>`."""

    layout = HuggingFaceInternVL()
    model = "InternVLForConditionalGeneration"
    processor = "InternVLProcessor"
    stand_in = replace(STAND_IN, config={**STAND_IN.config, "model_type": _VISION}, num_before=1, has_class_token=True)

    def draft(self, source: Source) -> Draft:
        from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor

        if (kind := source.tower.config["model_type"]) != _VISION:
            raise NotHeld(f"vision_encoder is a {kind}; the class has an {_VISION}.")
        token = soft_token(source, "context_image_token")
        begin, _, end = str(source.option("tiling", "picture_text", "{views}")).partition("{views}")
        source.check_tokens(begin, end)
        side, factor = source.tower.image_size, source.option("vision_tokenizer", "pixel_shuffle", 2)
        num_positions = (side // source.tower.patch_size // factor) ** 2
        square, settings = {"height": side, "width": side}, image_settings(source.config)
        named = {"start_image_token": begin, "end_image_token": end, "context_image_token": token.text}
        # The class looks for a video's token in each prompt. Without one, it is the one that no prompt holds yet.
        named["video_token"] = source.named_token("video_token", end)
        return Draft(
            config={
                "model_type": "internvl",
                "vision_config": dict(source.tower.config),
                "text_config": {**source.text_config, **source.rows(of_added=token.is_added)},
                "image_token_id": token.id,
                "image_seq_length": num_positions,
                "downsample_ratio": 1 / factor,
                "vision_feature_layer": source.layer,
            },
            images=GotOcr2ImageProcessor(
                size=square,
                crop_to_patches=True,
                min_patches=source.option("tiling", "min_tiles", 1),
                max_patches=source.option("tiling", "max_tiles") or 12,
                **settings,
            ),
            processor={"image_seq_length": num_positions},
            parts={"video_processor": InternVLVideoProcessor(size=square, **settings)},
            media_token=token.text,
            named_tokens=named,
            has_added_rows=token.is_added,
        )
