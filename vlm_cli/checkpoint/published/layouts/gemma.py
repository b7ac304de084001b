"""Gemma 3 and PaliGemma, as Transformers writes them: a SigLIP, a linear projection, and a Gemma that sees ahead.

Sources: transformers/models/gemma3, transformers/models/paligemma.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from transformers import Gemma3Config, PaliGemmaConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, make_language_model_rules, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Target, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import read_json

__all__ = ["HuggingFaceGemma3", "HuggingFacePaliGemma"]

_PROJECTOR = rf"{MODEL}multi_modal_projector\."
#: SigLIP's pixels, where no file says how they are prepared.
_LIKE = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
_WITHOUT_EFFECT = {"initializer_range", "tie_word_embeddings", "pad_token_id", "hidden_size", "vocab_size"}


_PROJECTION = Target("vision_tokenizer.proj.weight", transform=lambda x: x.T, restore=lambda x: x.T)


class HuggingFaceGemma3:
    """`mm_input_projection_weight` beside a tower and a language model, with a `config.json` of type `gemma3`."""

    name = "Gemma 3 (Hugging Face)"
    source = "transformers/models/gemma3/modeling_gemma3.py"
    settings = Settings(
        config=Gemma3Config,
        read={"vision_config", "text_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index"},
        without_effect=_WITHOUT_EFFECT | {"image_token_index", "image_token_id", "boi_token_id", "eoi_token_id"},
    )

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projection and the configuration's type."""
        return checkpoint.config.get("model_type") == "gemma3" and any(
            name.endswith("multi_modal_projector.mm_input_projection_weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts.

        A picture stands between the tokens that the tokenizer calls its beginning and its end. `<image>` is a new
        token, whose rows nothing reads: Gemma's own token for a vision token stays a word of its vocabulary.
        """
        parts = read_parts(checkpoint, self.settings, cuts=(), like=_LIKE)
        begin, end = (_read_token(checkpoint, parts, key) for key in ("boi_token_index", "eoi_token_index"))
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"hf:{checkpoint.name}"},
                "vision_tokenizer": {
                    "type": "linear",
                    "bias": False,
                    "pool": _read_pool(checkpoint.name, parts),
                    "norm": "gemma",
                    "norm_eps": parts.vision_config["config"].get("layer_norm_eps", 1e-6),
                },
                "fusion": {"type": "language-stream", "mask": "image"},
                "tiling": {"type": "none", "picture_text": f"\n\n{begin}{{views}}{end}\n\n"},
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [
                    (rf"{_PROJECTOR}mm_input_projection_weight", lambda _: [_PROJECTION]),
                    (rf"{_PROJECTOR}mm_soft_emb_norm\.weight", "vision_tokenizer.norm.weight"),
                    *parts.rules,
                    *make_language_model_rules(checkpoint, ours, has_added_rows=False),
                ]
            ),
            text_config=parts.text_config,
            vision_config=parts.vision_config,
            optional_pattern=rf"{parts.optional}|added_tokens\..*",
        )


class HuggingFacePaliGemma:
    """`multi_modal_projector.linear` beside a tower and a language model, with a `config.json` of type `paligemma`."""

    name = "PaliGemma (Hugging Face)"
    source = "transformers/models/paligemma/modeling_paligemma.py"
    settings = Settings(
        config=PaliGemmaConfig,
        read={"vision_config", "text_config", "image_token_index", "image_token_id", "projection_dim"},
        without_effect=_WITHOUT_EFFECT | {"ignore_index", "bos_token_id", "eos_token_id"},
    )

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projection and the configuration's type."""
        return checkpoint.config.get("model_type") == "paligemma" and any(
            name.endswith("multi_modal_projector.linear.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts, and its tokenizer has `<image>`.

        The token of the beginning stands after the picture, and not before the prompt. The whole prompt sees itself.
        """
        parts = read_parts(checkpoint, self.settings, cuts=(), like={**_LIKE, "interpolation": "bicubic"})
        # The fusion's mask says what sees ahead. The language model by itself is causal.
        text = parts.text_config | {"use_bidirectional_attention": False}
        begin = _read_token(checkpoint, parts, "bos_token_id")
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"hf:{checkpoint.name}"},
                "vision_tokenizer": {"type": "linear"},
                "fusion": {"type": "language-stream", "mask": "prefix"},
                "tiling": {"type": "none", "picture_text": f"{{views}}{begin}"},
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [
                    (rf"{_PROJECTOR}linear\.(\w+)", r"vision_tokenizer.proj.\1"),
                    *parts.rules,
                    *make_language_model_rules(checkpoint, ours),
                ]
            ),
            text_config=text,
            vision_config=parts.vision_config,
            first_added_id=checkpoint.config.get("image_token_index", parts.config.image_token_index),
            starts_with_bos=False,
            optional_pattern=parts.optional,
            notes=(f"PaliGemma was trained with a line break after each prompt: $'{MEDIA_TOKEN}caption en\\n'.",),
        )


def _read_pool(name: str, parts: HFParts) -> int:
    """Return how many patches per side become one token.

    Raises:
        CheckpointError: if the tokens are no square that divides the patches.
    """
    config: Any = parts.config
    patches = config.vision_config.image_size // config.vision_config.patch_size
    side = isqrt(config.mm_tokens_per_image)
    if side**2 != config.mm_tokens_per_image or patches % side:
        raise CheckpointError(
            f"{name!r} makes {config.mm_tokens_per_image} tokens of {patches} x {patches} patches; vlm averages whole "
            "squares of patches."
        )
    return patches // side


def _read_token(checkpoint: PublishedCheckpoint, parts: HFParts, key: str) -> str:
    """Return the tokenizer's text of a token that the configuration names by its id."""
    token_id = checkpoint.config.get(key, getattr(parts.config, key, None))
    if token_id is None:
        token_id = parts.text_config.get(key)
    found: dict[int, str] = {}
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (file := checkpoint.folder / name).is_file():
            found |= _list_tokens(read_json(file))
    if token_id not in found:
        raise CheckpointError(
            f"{checkpoint.name!r} has no token {token_id!r} in the files of its tokenizer, which its config.json names "
            f"as {key}. Restore the published files."
        )
    return found[token_id]


def _list_tokens(data: Any) -> dict[int, str]:
    """Return the special tokens in a file of a tokenizer, id -> text."""
    if not isinstance(data, Mapping):
        return {}
    decoder, added = data.get("added_tokens_decoder"), data.get("added_tokens")
    pairs = [(key, x) for key, x in decoder.items()] if isinstance(decoder, Mapping) else []
    pairs += [(x.get("id"), x) for x in added if isinstance(x, Mapping)] if isinstance(added, list) else []
    texts = {str(key): x["content"] for key, x in pairs if isinstance(x, Mapping) and isinstance(x.get("content"), str)}
    return {int(key): text for key, text in texts.items() if key.isdecimal()}
