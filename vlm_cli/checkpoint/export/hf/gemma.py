"""Transformers' PaliGemma and Gemma 3: a SigLIP, one linear map, and a Gemma that sees ahead."""

from __future__ import annotations

from typing import Any

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, Source, image_settings, soft_token, split_text
from vlm_cli.checkpoint.export.hf.towers import NotHeld
from vlm_cli.checkpoint.published.layouts.gemma import HuggingFaceGemma3, HuggingFacePaliGemma

__all__ = ["Gemma3Class", "PaliGemmaClass"]


class PaliGemmaClass(HFClass):
    """PaliGemma's class: the whole prompt sees itself. Its processor ends each prompt with a line break."""

    layout = HuggingFacePaliGemma()
    model = "PaliGemmaForConditionalGeneration"
    processor = "PaliGemmaProcessor"
    language_models = ("gemma", "gemma2")

    def draft(self, source: Source) -> Draft:
        from transformers import SiglipImageProcessor

        _check_tower(source)
        described = source.describe("paligemma")
        described["text_config"].pop("use_bidirectional_attention", None)
        _, begin = split_text(source, "picture_text", "{views}")
        source.check_tokens(begin)
        begin_id = _id_of(source, begin, 0)
        width = source.config.get_text_config(decoder=True).hidden_size
        images: Any = SiglipImageProcessor(size=source.square, **image_settings(source.config))
        images.image_seq_length = source.num_positions
        return Draft(
            config={
                **described,
                "image_token_index": source.config.media_token_id,
                "projection_dim": width,
                "hidden_size": width,
                "bos_token_id": begin_id,
            },
            images=images,
            token_ids={begin_id: {"content": begin}},
            ends_prompts_with="\n",
        )


class Gemma3Class(HFClass):
    """Gemma 3's class: the positions of a picture see each other, and two tokens stand around them."""

    layout = HuggingFaceGemma3()
    model = "Gemma3ForConditionalGeneration"
    processor = "Gemma3Processor"
    language_models = ("gemma3_text",)

    def draft(self, source: Source) -> Draft:
        from transformers import Gemma3ImageProcessor

        _check_tower(source)
        token = soft_token(source, "image_token")
        side = source.tower.image_size // source.tower.patch_size // source.option("vision_tokenizer", "pool", 1)
        before, after = split_text(source, "picture_text", "{views}")
        names = {"boi": before.strip("\n"), "eoi": after.strip("\n")}
        source.check_tokens(*names.values())
        ids = {key: _id_of(source, text, default) for (key, text), default in zip(names.items(), (0, 1), strict=True)}
        return Draft(
            config={
                **source.describe("gemma3", token),
                "mm_tokens_per_image": side**2,
                "boi_token_index": ids["boi"],
                "eoi_token_index": ids["eoi"],
                "image_token_index": token.id,
            },
            images=Gemma3ImageProcessor(size=source.square, **image_settings(source.config)),
            processor={"image_seq_length": side**2},
            media_token=names["boi"],
            named_tokens={"boi_token": names["boi"], "eoi_token": names["eoi"], "image_token": token.text},
            token_ids={ids[key]: {"content": text} for key, text in names.items()},
            has_added_rows=token.is_added,
        )


def _id_of(source: Source, text: str, default: int) -> int:
    """Return a token's id; the default where only the configuration of the model is known."""
    found: Any = None if source.tokenizer is None else source.tokenizer.get_vocab().get(text)
    return default if found is None else int(found)


def _check_tower(source: Source) -> None:
    """Refuse a vision encoder with tokens that are no patches, all of which the classes project.

    Raises:
        NotHeld: if there are such tokens.
    """
    if source.tower.num_before:
        raise NotHeld("vision_encoder has a class token; the class projects every token, and vlm the patches alone.")
