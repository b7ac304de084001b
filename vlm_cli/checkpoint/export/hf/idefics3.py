"""Transformers' Idefics3 and SmolVLM: a SigLIP, a pixel shuffle, one linear map, and texts around each tile."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings
from vlm_cli.checkpoint.export.hf.towers import NotHeld
from vlm_cli.checkpoint.parts.plain_types import PLAIN_TYPES, order_positions
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.layouts.idefics3 import HuggingFaceIdefics3, HuggingFaceSmolVLM

__all__ = ["NO_NUM2WORDS", "Idefics3Class", "SmolVLMClass"]

#: What stands in SmolVLM's way where a package of its processor is not installed.
NO_NUM2WORDS = "the class's processor needs the package num2words: pip install num2words."


class Idefics3Class(HFClass):
    """Idefics3's class."""

    layout: Layout = HuggingFaceIdefics3()
    model = "Idefics3ForConditionalGeneration"
    processor = "Idefics3Processor"
    images = "Idefics3ImageProcessor"
    model_type = "idefics3"
    tower = r"model\.vision_model\."

    def draft(self, source: Source) -> Draft:
        import transformers

        side = source.tower.image_size
        images = getattr(transformers, self.images)(
            size={"longest_edge": source.option("tiling", "longest_edge") or 4 * side},
            max_image_size={"longest_edge": side},
            **image_settings(source.config),
        )
        return Draft(
            config={
                **source.describe(self.model_type),
                "vision_config": self._vision_config(source),
                "image_token_id": source.config.media_token_id,
                "scale_factor": source.option("vision_tokenizer", "pixel_shuffle", 2),
            },
            images=images,
            processor={"image_seq_len": source.num_positions},
            parts=self.more_parts(source),
        )

    def more_parts(self, source: Source) -> dict[str, Any]:
        """Return what the processor has beside its image processor and its tokenizer."""
        return {}

    def _vision_config(self, source: Source) -> dict[str, Any]:
        """Return the configuration of a SigLIP under the class's own type.

        Raises:
            NotHeld: if it is no SigLIP, or one whose positions the class mixes up.
        """
        given, kind = source.tower.config, f"{self.model_type}_vision"
        if given["model_type"] != "siglip_vision_model":
            raise NotHeld(f"vision_encoder is a {given['model_type']}; the class has a SigLIP.")
        count = (source.tower.image_size // source.tower.patch_size) ** 2
        rows = torch.arange(count)[:, None]
        if not torch.equal(order_positions(rows), rows):
            raise NotHeld(
                f"vision_encoder has {count} patches; the class gives some of them the position of another one."
            )
        settings = PLAIN_TYPES[kind].settings
        return {"model_type": kind, **{key: x for key, x in given.items() if key in settings}}


class SmolVLMClass(Idefics3Class):
    """SmolVLM's class, which has Idefics3's parts and reads clips, too. Its processor needs num2words."""

    layout: Layout = HuggingFaceSmolVLM()
    model = "SmolVLMForConditionalGeneration"
    processor = "SmolVLMProcessor"
    images = "SmolVLMImageProcessor"
    model_type = "smolvlm"

    def more_parts(self, source: Source) -> dict[str, Any]:
        from transformers import SmolVLMVideoProcessor

        if find_spec("num2words") is None:
            source.problems.append(NO_NUM2WORDS)
        return {"video_processor": SmolVLMVideoProcessor()}
