"""DeepSeek-VL (https://arxiv.org/abs/2403.05525), as Transformers writes it: a SigLIP, two linear maps and a Llama.

Sources: transformers/models/deepseek_vl, `DeepseekVLForConditionalGeneration` and `DeepseekVLImageProcessor`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from transformers import DeepseekVLConfig

from vlm_cli.checkpoint.published.announcing import read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_grid import check_tokens_of_a_tile
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, make_language_model_rules, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["PADDED_PIXELS", "HuggingFaceDeepSeekVL", "describe_aligned_model", "read_padded_parts"]

#: Settings of the image processor: the least side, and a colour that its code computes anew.
PADDED_PIXELS: Collection[str] = {"min_size", "background_color"}
_LIKE = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
_LEAST_SIDE = 14  # pixels, where no file says it
_SETTINGS = Settings(
    config=DeepseekVLConfig,
    read={"vision_config", "text_config"},
    without_effect={"image_token_id", "tie_word_embeddings"},
)
#: Settings of the processor -> Transformers' defaults.
_PROCESSOR = {"num_image_tokens": 576}
_ALIGNER: list[Rule] = [
    (rf"{MODEL}aligner\.linear1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
    (rf"{MODEL}aligner\.linear2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
]


class HuggingFaceDeepSeekVL:
    """`vision_model`, `aligner` and `language_model`, with a `config.json` of type `deepseek_vl`."""

    name = "DeepSeek-VL (Hugging Face)"
    source = "transformers/models/deepseek_vl/modeling_deepseek_vl.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the aligner's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == "deepseek_vl" and any(
            name.endswith("aligner.linear1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts."""
        parts = read_padded_parts(checkpoint, _SETTINGS)
        texts = read_processor(checkpoint.folder, _PROCESSOR)
        check_tokens_of_a_tile(checkpoint, parts, 1, texts["num_image_tokens"])
        return describe_aligned_model(checkpoint, parts, rules=_ALIGNER)


def read_padded_parts(checkpoint: PublishedCheckpoint, settings: Settings) -> HFParts:
    """Read the parts of a model whose pictures keep their shape, with bars of the mean colour.

    Raises:
        CheckpointError: for a setting that vlm cannot carry over.
    """
    parts = read_parts(checkpoint, settings, cuts=PADDED_PIXELS, like=_LIKE)
    images = parts.images
    if str(images.get("image_processor_type", "")).startswith(
        "Siglip"
    ):  # which stretches pictures, as vlm may write it
        return parts
    if images.get("do_pad", True) is not True:
        raise CheckpointError(
            f"{checkpoint.name!r} sets do_pad={show(images['do_pad'])} for its pictures; vlm builds only true."
        )
    least, size = images.get("min_size", _LEAST_SIDE), parts.vision_config["vision_cfg"]["image_size"]
    if not isinstance(least, int) or not 1 <= least <= size:
        raise CheckpointError(
            f"{checkpoint.name!r} sets min_size={show(least)} for its pictures; it must be 1 to {size} pixels."
        )
    mean = images.get("image_mean", _LIKE["mean"])
    fill = (127,) * 3 if mean is None else tuple(int(x * 255) for x in mean)
    pixels: Mapping[str, Any] = parts.vision_config["preprocess"]
    padded = {"resize_mode": "longest", "fill_color": fill, "least_side": least}
    return replace(parts, vision_config={**parts.vision_config, "preprocess": {**pixels, **padded}})


def describe_aligned_model(
    checkpoint: PublishedCheckpoint,
    parts: HFParts,
    *,
    rules: list[Rule],
    map_depth: int = 2,
    picture_text: str = "{views}",
    notes: tuple[str, ...] = (),
) -> CheckpointDescription:
    """Describe a checkpoint of `vision_model`, an aligner of linear maps and `language_model`.

    `<image>` is added to the tokenizer, after its last token. Nothing reads the row of `<image>` in the tables.

    Args:
        checkpoint: holds all parts.
        parts: its configurations.
        rules: for the aligner.
        map_depth: linear maps of the aligner.
        picture_text: what stands around the vision tokens of a picture.
        notes: sentences that the user should read.
    """
    return CheckpointDescription(
        composition={
            "family": "llava",
            "vision_encoder": {"name": f"hf:{checkpoint.name}"},
            "vision_tokenizer": {"type": "mlp", "map_depth": map_depth},
            "fusion": "language-stream",
            **({} if picture_text == "{views}" else {"tiling": {"type": "none", "picture_text": picture_text}}),
            "language_model": {"name": checkpoint.name},
            "added_tokens": [MEDIA_TOKEN],
            "trainable": ["vision_tokenizer", "language_model"],
        },
        targets_for=lambda ours: make_targets_of(
            [
                *rules,
                (rf"{MODEL}vision_model\.(?:vision_model\.)?(.*)", r"vision_encoder.visual.\1"),
                *make_language_model_rules(checkpoint, ours, has_added_rows=False),
            ]
        ),
        text_config=parts.text_config,
        vision_config=parts.vision_config,
        optional_pattern=r"vision_encoder\.visual\.head\..*|added_tokens\..*",
        notes=notes,
    )
