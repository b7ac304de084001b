"""Transformers' classes over a model of timm: Perception-LM, and FastVLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings, make_one_view, soft_token
from vlm_cli.checkpoint.export.hf.towers import STAND_IN
from vlm_cli.checkpoint.published.layouts.fast_vlm import HuggingFaceFastVLM
from vlm_cli.checkpoint.published.layouts.perception_lm import HuggingFacePerceptionLM
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["FastVLMClass", "PerceptionLMClass"]


def _stand_in(architecture: str, dim: int) -> dict[str, Any]:
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": {}, "hidden_size": dim}


class PerceptionLMClass(HFClass):
    """Perception-LM's class: rows of patches, two linear maps, and a pooling behind them."""

    layout = HuggingFacePerceptionLM()
    model = "PerceptionLMForConditionalGeneration"
    processor = "PerceptionLMProcessor"
    takes_timm = True
    stand_in = replace(
        STAND_IN,
        config=_stand_in("vit_pe_core_tiny_patch16_384", 192),
        image_size=384,
        num_before=1,
        has_class_token=True,
    )

    def draft(self, source: Source) -> Draft:
        from transformers import PerceptionLMImageProcessor, PerceptionLMVideoProcessor

        token, tower = soft_token(source, "image_token"), source.tower
        video, vocabulary = _find_spare_token(source)
        pool, is_cut = source.option("vision_tokenizer", "pool", 1), source.option("tiling", "max_tiles") is not None
        args = {**tower.config["model_args"], "embed_dim": tower.config["hidden_size"]}
        return Draft(
            config={
                **source.describe("perception_lm", token),
                "vision_config": {**tower.config, "model_args": args},
                "vision_use_cls_token": tower.has_class_token,
                "projector_pooling_ratio": pool,
                "image_token_id": token.id,
                "video_token_id": vocabulary.get(video, token.id + 1),
            },
            images=PerceptionLMImageProcessor(
                tile_size=tower.image_size,
                max_num_tiles=source.option("tiling", "max_tiles") or 1,
                vision_input_type="thumb+tile" if is_cut else "vanilla",
                **image_settings(source.config),
            ),
            processor={"patch_size": tower.patch_size, "pooling_ratio": pool},
            parts={"video_processor": PerceptionLMVideoProcessor()},
            media_token=token.text,
            named_tokens={"image_token": token.text, "video_token": video},
            has_added_rows=token.is_added,
        )


class FastVLMClass(HFClass):
    """FastVLM's class: a map, of which each place is a patch, and two linear maps."""

    layout = HuggingFaceFastVLM()
    model = "FastVlmForConditionalGeneration"
    processor = "LlavaProcessor"
    takes_timm = takes_maps = True
    stand_in = replace(STAND_IN, config=_stand_in("fastvit_t8", 768), image_size=256, patch_size=32)

    def draft(self, source: Source) -> Draft:
        return Draft(
            config={
                **source.describe("fast_vlm"),
                "image_token_index": source.config.media_token_id,
                "image_seq_length": source.num_positions,
                "multimodal_projector_bias": source.option("vision_tokenizer", "bias", True),
            },
            images=make_one_view(source),
            processor={
                "patch_size": source.tower.patch_size,
                "vision_feature_select_strategy": "full",
                "image_token": MEDIA_TOKEN,
            },
        )


def _find_spare_token(source: Source) -> tuple[str, dict[str, int]]:
    """Return a token that no prompt about a picture has, for clips, and the ids of all tokens.

    The processor counts it in texts and in ids, so that it must be none that the tokenizer adds by itself.
    """
    tokenizer = source.tokenizer
    if tokenizer is None:
        return MEDIA_TOKEN, {}
    taken = {tokenizer.pad_token, tokenizer.bos_token, None}
    spare = next((x for x in (tokenizer.unk_token, tokenizer.eos_token) if x not in taken), None)
    found = source.named_token("video_token", spare or "")
    if not found:
        source.problems.append("the class's processor has a token for clips, and the tokenizer has none to spare.")
    return found or MEDIA_TOKEN, tokenizer.get_vocab()
