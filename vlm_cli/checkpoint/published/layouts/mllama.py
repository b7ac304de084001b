"""Mllama (Llama 3.2 Vision, https://arxiv.org/abs/2407.21783), as Transformers writes it.

Source: transformers/models/mllama, `MllamaForConditionalGeneration`: modeling_mllama.py, processing_mllama.py and
image_processing_mllama.py.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from transformers import MllamaConfig, MllamaTextConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, read_parts
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.shapes import interval_of
from vlm_cli.checkpoint.published.tables import added_targets
from vlm_cli.checkpoint.published.targets import Rule, Target, TargetsOf, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.schema import show

__all__ = ["HuggingFaceMllama"]

_LAYER = rf"{MODEL}language_model\.(?:model\.)?layers\.(\d+)\."
_NOTES = (
    "In vlm, text after several images that follow each other directly sees the last of them; Llama 3.2 Vision shows "
    "it all of these. Put text between images, or build with --set fusion.attend=all.",
    "Llama 3.2 Vision begins a prompt that starts with an image with the image, and then the token that starts a text; "
    "vlm begins every prompt with that token, as the chat template does.",
)
_SETTINGS = Settings(
    config=MllamaConfig,
    read={"vision_config", "text_config", "image_token_index", "image_token_id"},
    without_effect={"tie_word_embeddings", "pad_token_id"},
)
#: Settings that Llama has under the same names.
_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("rope_parameters", "rms_norm_eps", "max_position_embeddings", "initializer_range", "bos_token_id"),
    *("eos_token_id", "pad_token_id"),
)
_TEXT = Settings(
    config=MllamaTextConfig,
    read={*_LLAMA, "num_hidden_layers", "cross_attention_layers", "rope_theta", "rope_scaling"},
    without_effect={"dropout", "use_cache"},
    fixed={"hidden_act": ("silu",), "tie_word_embeddings": (False,)},
)
#: How pictures are prepared where no file says it.
_PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
_MODULES = {
    "cross_attn_attn_gate": "attn_gate",
    "cross_attn_mlp_gate": "ff_gate",
    "input_layernorm.weight": "attn.norm.weight",
    "post_attention_layernorm.weight": "ff.norm.weight",
}


class HuggingFaceMllama:
    """`vision_model`, `multi_modal_projector`, and cross-attention layers among Llama's own."""

    name = "Mllama (Hugging Face)"
    source = "transformers/models/mllama/modeling_mllama.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for a gate of a cross-attention layer and the configuration's type."""
        has_gate = any(re.fullmatch(rf"{_LAYER}cross_attn_attn_gate", name) for name in checkpoint.tensors)
        return has_gate and checkpoint.config.get("model_type") == "mllama"

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts."""
        check_settings_of(checkpoint.name, "text_config", checkpoint.config.get("text_config") or {}, _TEXT)
        parts = read_parts(checkpoint, _SETTINGS, cuts={"max_image_tiles", "do_pad"}, like=_PIXELS)
        text = parts.text_config
        crossing = sorted(text["cross_attention_layers"])
        return CheckpointDescription(
            composition={
                "family": "flamingo",
                "vision_encoder": {"name": f"hf:{checkpoint.name}", "class_token": True},
                "vision_tokenizer": {"type": "linear", "dim_out": text["hidden_size"]},
                "fusion": _read_fusion(checkpoint.name, text, crossing),
                "tiling": {
                    **{"type": "grid", "choose": "scale", "fit": "corner", "thumbnail": "none"},
                    "max_tiles": _read_tiles(checkpoint.name, parts),
                },
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
            },
            targets_for=lambda ours: _make_targets(parts, ours, crossing),
            text_config={
                "model_type": "llama",
                "num_hidden_layers": text["num_hidden_layers"] - len(crossing),
                "tie_word_embeddings": False,
                **{name: text[name] for name in _LLAMA if name in text},
            },
            vision_config=parts.vision_config,
            optional_pattern=r"added_tokens\..*",  # the head has no row for them
            notes=_NOTES,
        )


def _read_fusion(name: str, text: dict[str, Any], crossing: Sequence[int]) -> dict[str, Any]:
    """Read the settings of the blocks. Block i stands before the decoder layer that follows it among Llama's own.

    Raises:
        CheckpointError: if there are no blocks, or they do not stand at equal distances from the first to the end.
    """
    depth, heads = text["num_hidden_layers"] - len(crossing), text["num_attention_heads"]
    places = [layer - i for i, layer in enumerate(crossing)]
    every = interval_of(places, single=max(1, depth))
    if not every or list(range(places[0], depth, every)) != places:
        raise CheckpointError(
            f"{name!r} has cross_attention_layers={show(list(crossing))} of {text['num_hidden_layers']} layers; vlm "
            "builds blocks at equal distances, up to the last decoder layer."
        )
    return {
        "type": "llama-cross-attention",
        "every": every,
        "first": places[0],
        "num_heads": heads,
        "num_kv_heads": text["num_key_value_heads"],
        "head_dim": text["hidden_size"] // heads,
        "dim_ff": text["intermediate_size"],
        "qk_norm": True,
        "norm_eps": text["rms_norm_eps"],
        "feed_forward_before_media": False,
        "attend_before_media": True,
    }


def _read_tiles(name: str, parts: HFParts) -> int:
    """Read the most number of tiles, which the model and its image processor each have.

    Raises:
        CheckpointError: if they differ, or if the model lacks a grid of so many tiles.
    """
    vision = parts.vision_config["config"]
    most: int = vision["max_num_tiles"]
    given = parts.images.get("max_image_tiles", most)
    grids = [[rows, columns] for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    if given != most or [list(x) for x in vision["supported_aspect_ratios"]] != grids:
        raise CheckpointError(
            f"{name!r} has embeddings for {show(vision['supported_aspect_ratios'])} of at most {most} tiles, and its "
            f"image processor cuts all grids of at most {show(given)} tiles. Restore the published files."
        )
    return most


def _make_targets(parts: HFParts, ours: VLMConfig, crossing: Sequence[int]) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration.

    Args:
        parts: the checkpoint's configurations.
        ours: the VLM's configuration.
        crossing: numbers of the cross-attention layers among all layers of the checkpoint.
    """
    rows, media_row = parts.text_config["vocab_size"], parts.config.image_token_index

    def to_layer(match: re.Match[str]) -> list[Target]:
        number, name = int(match[1]), match[2]
        own = number - bisect_left(crossing, number)
        if number not in crossing:
            return [Target(f"lang_model.model.layers.{own}.{name}")]
        name = _MODULES.get(name) or re.sub(r"^cross_attn\.", "attn.", re.sub(r"^mlp\.", "ff.", name))
        return [Target(f"fusion.blocks.{own}.{name}")]

    def to_embedding(match: re.Match[str]) -> list[Target]:
        """Give each added token its row, which is after Llama's; `<image>` takes the row of the published token."""
        found = [Target("lang_model.model.embed_tokens.weight", source_rows=slice(rows))]
        for i, token in enumerate(ours.added_tokens):
            row = media_row if token == MEDIA_TOKEN else ours.first_added_id + i
            if row < rows + _MORE_ROWS:
                found += added_targets(("embedding",), source_rows=slice(row, row + 1), target_rows=slice(i, i + 1))
        return found

    rules: list[Rule] = [
        (rf"{MODEL}vision_model\.(.*)", r"vision_encoder.visual.\1"),
        (rf"{MODEL}multi_modal_projector\.(\w+)", r"vision_tokenizer.proj.\1"),
        (rf"{_LAYER}(.*)", to_layer),
        (rf"{MODEL}language_model\.(?:model\.)?embed_tokens\.weight", to_embedding),
        (rf"{MODEL}language_model\.(?:model\.)?(norm\..*)", r"lang_model.model.\1"),
        (r"(?:language_model\.)?lm_head\.weight", "lang_model.lm_head.weight"),
    ]
    return make_targets_of(rules)


#: Rows of the embedding after the vocabulary; the first is that of the published token for an image.
_MORE_ROWS = 8
