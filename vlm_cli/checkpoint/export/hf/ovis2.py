"""Transformers' `Ovis2ForConditionalGeneration`: an AIMv2, and a vocabulary of what is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlm_cli.checkpoint.export.hf.draft import Draft, HFClass, SoftToken, Source, image_settings
from vlm_cli.checkpoint.export.hf.towers import STAND_IN, NotHeld
from vlm_cli.checkpoint.parts.plain_types import PLAIN_TYPES
from vlm_cli.checkpoint.published.layouts.ovis2 import HuggingFaceOvis2
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.modeling.vlm import VLM

__all__ = ["Ovis2Class"]

_VISION = "ovis2_vision"
_AIMV2 = PLAIN_TYPES[_VISION]
_TOKEN = "<IMG_ATOM>"
#: Tokens whose rows are the last ones of the visual vocabulary, in their order there.
_INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


class Ovis2Class(HFClass):
    """Ovis2's class. Its processor writes `<IMG_ATOM>` for a vision token, and five more tokens around tiles."""

    layout = HuggingFaceOvis2()
    model = "Ovis2ForConditionalGeneration"
    processor = "Ovis2Processor"
    tower = r"(?!)"  # the layout has the names of its tensors
    language_models = ("qwen2", "qwen3", "llama")
    stand_in = replace(STAND_IN, config={"model_type": _AIMV2.model_type, "image_size": 224, "patch_size": 16})

    def draft(self, source: Source) -> Draft:
        from transformers import Ovis2ImageProcessor

        first, *others = _find_ids(source)
        described = source.describe("ovis2", SoftToken(_TOKEN, first, False))
        text = described["text_config"]
        sizes = {key: text[key] for key in ("vocab_size", "hidden_size") if key in text}
        is_cut = source.option("tiling", "max_tiles") != 1
        return Draft(
            config={
                **described,
                **sizes,
                # The tables are compared without the rows of the indicators, which the embedding has twice.
                "text_config": {**text, "tie_word_embeddings": True},
                "vision_config": _make_vision_config(source, sizes.get("hidden_size", 32)),
                "image_token_id": first,
                "visual_indicator_token_ids": others,
            },
            images=Ovis2ImageProcessor(
                size=source.square,
                crop_to_patches=is_cut and source.config.composition.tiling.type == "grid",
                use_covering_area_grid=source.option("tiling", "choose") == "cover",
                min_patches=source.option("tiling", "min_tiles", 1),
                max_patches=source.option("tiling", "max_tiles") or 12,
                **image_settings(source.config),
            ),
            processor={"image_seq_length": source.num_positions},
            has_added_rows=False,
            unanswered=others,
            kept_tokens=(MEDIA_TOKEN,),
        )

    def find_tables(self, model: VLM, config: Any) -> tuple[Tensor, Tensor]:
        """Return the tables. They are tied if they are the same in all rows that the class reads from them.

        In the place of the indicators' rows, a VLM's embedding has those of the visual vocabulary.
        """
        table, head = super().find_tables(model, config)
        rows = list(config.visual_indicator_token_ids)
        read = table.detach().clone()
        read[rows] = head.detach()[rows]
        return (head, head) if torch.equal(read, head) else (table, head)


def _find_ids(source: Source) -> list[int]:
    """Return the ids of the class's tokens, the vision token's first; any where only the configuration is known.

    A token without a row in the language model's tables is a problem, since the class has no other rows.
    """
    if source.tokenizer is None:
        return list(range(1 + len(_INDICATORS)))
    known, names = source.tokenizer.get_vocab(), (_TOKEN, *_INDICATORS)
    source.check_tokens(*names)
    rows = source.config.get_text_config(decoder=True).vocab_size
    if beyond := [x for x in names if known.get(x, 0) >= rows]:
        source.problems.append(f"the language model's tables have no row for {beyond[0]!r}, which the class needs.")
    return [known.get(name, i) for i, name in enumerate(names)]


def _make_vision_config(source: Source, width: int) -> dict[str, Any]:
    """Return the configuration of an AIMv2 under the class's own type.

    Args:
        source: with the vision encoder.
        width: channels of the language model.

    Raises:
        NotHeld: if it is of another type, or has positions for pictures of every shape.
    """
    given = source.tower.config
    if (kind := given["model_type"]) != _AIMV2.model_type:
        raise NotHeld(f"vision_encoder is of type {kind}; the class has {_AIMV2.model_type}.")
    if given.get("is_native"):
        raise NotHeld("vision_encoder is an AIMv2 with is_native true; the class has false.")
    words = int(source.option("vision_tokenizer", "dim_hidden") or width)
    return {
        **{key: given[key] for key in _AIMV2.settings if key in given},
        "model_type": _VISION,
        "vocab_size": words + len(_INDICATORS),
        "num_visual_indicator_tokens": len(_INDICATORS),
        "hidden_stride": source.option("vision_tokenizer", "pixel_shuffle", 2),
    }
