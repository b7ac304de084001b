"""Transformers' `GotOcr2ForConditionalGeneration`: a SAM's map, two convolutions and a linear map."""

from __future__ import annotations

from dataclasses import replace

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings, soft_token
from vlm_cli.checkpoint.export.hf.towers import STAND_IN, NotHeld
from vlm_cli.checkpoint.published.layouts.got_ocr2 import HuggingFaceGotOCR2

__all__ = ["GotOCR2Class"]

_VISION, _TOKEN = "got_ocr2_vision", "<imgpad>"
#: What the class's processor writes for a picture, whatever the vision encoder gives.
_POSITIONS = 256


class GotOCR2Class(HFClass):
    """GOT-OCR 2.0's class. Its processor finds `<imgpad>` in a prompt; `<img>` and `</img>` stand around it."""

    layout = HuggingFaceGotOCR2()
    model = "GotOcr2ForConditionalGeneration"
    processor = "GotOcr2Processor"
    takes_maps = True
    stand_in = replace(STAND_IN, config={"model_type": _VISION}, image_size=1024, patch_size=16)

    def draft(self, source: Source) -> Draft:
        from transformers import GotOcr2ImageProcessor

        if (kind := source.tower.config["model_type"]) != _VISION:
            raise NotHeld(f"vision_encoder is of type {kind}; the class has {_VISION}.")
        token = soft_token(source, "", _TOKEN)
        source.check_tokens(_TOKEN)
        if source.num_positions != _POSITIONS:
            source.problems.append(
                f"the model has {source.num_positions} vision tokens for a picture; the class's processor writes "
                f"{_POSITIONS}."
            )
        return Draft(
            config={**source.describe("got_ocr2", token), "image_token_index": token.id},
            images=GotOcr2ImageProcessor(size=source.square, **image_settings(source.config)),
            media_token=f"<img>{_TOKEN}</img>",
            has_added_rows=token.is_added,
        )
