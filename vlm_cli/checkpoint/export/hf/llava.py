"""Transformers' `LlavaForConditionalGeneration`: patches of one view, through two linear maps, among the text."""

from __future__ import annotations

from dataclasses import replace

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, make_one_view
from vlm_cli.checkpoint.export.hf.towers import STAND_IN, NotHeld
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.layouts.llava import HuggingFaceLLaVA
from vlm_cli.checkpoint.published.layouts.vipllava import HuggingFaceViPLLaVA
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["LLaVAClass", "ViPLLaVAClass"]


class LLaVAClass(HFClass):
    """LLaVA-1.5's class. Its tower may be a CLIP, a SigLIP, or another vision transformer of Transformers."""

    layout: Layout = HuggingFaceLLaVA()
    model = "LlavaForConditionalGeneration"
    processor = "LlavaProcessor"

    def draft(self, source: Source) -> Draft:
        ours = source.config
        drops = source.tower.num_before == 1 and not source.option("vision_encoder", "class_token", False)
        strategy = "default" if drops else "full"
        return Draft(
            config={
                **source.describe("llava"),
                "image_token_index": ours.media_token_id,
                "image_seq_length": source.num_positions,
                "vision_feature_layer": source.layer,
                "vision_feature_select_strategy": strategy,
                # A single map is the first of two, and the second one changes nothing.
                "projector_hidden_act": "linear" if ours.composition.vision_tokenizer.type == "linear" else "gelu",
                "multimodal_projector_bias": source.option("vision_tokenizer", "bias", True),
            },
            images=make_one_view(source),
            processor={
                "patch_size": source.tower.patch_size,
                "vision_feature_select_strategy": strategy,
                "image_token": MEDIA_TOKEN,
                "num_additional_image_tokens": source.tower.num_before,
            },
        )


class ViPLLaVAClass(LLaVAClass):
    """ViP-LLaVA's class: LLaVA's parts over several layers, with a norm of their channels."""

    layout = HuggingFaceViPLLaVA()
    model = "VipLlavaForConditionalGeneration"
    stand_in = replace(
        STAND_IN, config={**STAND_IN.config, "model_type": "clip_vision_model"}, num_before=1, has_class_token=True
    )

    def draft(self, source: Source) -> Draft:
        if source.tower.num_before != 1:
            raise NotHeld(
                f"vision_encoder has {source.tower.num_before} tokens before the patches; the class drops one."
            )
        found = super().draft(source)
        foreign = ("vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias")
        kept = {key: x for key, x in found.config.items() if key not in foreign}
        epsilon = source.option("vision_tokenizer", "norm_eps", 1e-5)
        return replace(
            found,
            config={**kept, "model_type": "vipllava", "projector_layernorm_eps": epsilon},
            processor={**found.processor, "vision_feature_select_strategy": "default"},
        )
