"""nanoVLM: SigLIP, a pixel shuffle with a linear projection, and SmolLM2.

Source: https://github.com/huggingface/nanoVLM, `models/`; v0.1 wrote nanoVLM-222M, `main` the later ones.

In v0.1 an image has no token: its 49 vectors stand before the text. Our `<image>` is an added token of which nothing
but its place is read. Later models have a token for each vector, which our `<image>` replaces, and others beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Target, TargetsOf, mean_rows, renamer
from vlm_cli.checkpoint.published.towers.siglip import SIGLIP_UNNEEDED, siglip_name, siglip_vision_config
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["NanoVLM"]

_TRUNK, _LM = "vision_encoder.visual.trunk.", "lang_model.model."


class NanoVLM:
    """`vision_encoder.*`, `MP.proj` and `decoder.*`, with a `config.json` of `vit_…`, `lm_…` and `mp_…`."""

    name = "nanoVLM"
    source = "https://github.com/huggingface/nanoVLM/blob/main/models/vision_language_model.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        return {"MP.proj.weight", "decoder.norm.weight", "vision_encoder.patch_embedding.conv.weight"} <= set(
            checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        config = checkpoint.config
        if "lm_n_heads" not in config:
            raise CheckpointError(
                f"{checkpoint.name!r} has no config.json of nanoVLM, and its tensors do not say how many heads there "
                "are. Give the directory that holds both."
            )
        _check(checkpoint)
        vision = {
            "hidden_size": config["vit_hidden_dim"],
            "num_hidden_layers": config["vit_n_blocks"],
            "num_attention_heads": config["vit_n_heads"],
            "patch_size": config["vit_patch_size"],
            "image_size": config["vit_img_size"],
            "layer_norm_eps": config["vit_ln_eps"],
        }
        # Images are neither centred nor scaled there, although SigLIP's own were.
        tiled = "max_img_size" in config
        plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic" if tiled else "bilinear"}
        extra = dict(config.get("vlm_extra_tokens") or {})
        extra["image_token"] = MEDIA_TOKEN
        base = config.get("lm_base_vocab_size", config["lm_vocab_size"])
        notes = []
        if tiled:
            notes.append(
                "nanoVLM cuts an image in tiles and shows all of them; vlm shows the whole image alone. Write "
                f"{extra.get('global_image_token', '')}{MEDIA_TOKEN} before the question, and add --special-tokens."
            )
        if "image_token" not in (config.get("vlm_extra_tokens") or {}):
            notes.append(f"This model was trained with the image first: {MEDIA_TOKEN}Question: … Answer:")
        has_rows = config["lm_vocab_size"] > base
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": siglip_name(vision)},
                "vision_tokenizer": {
                    "type": "linear",
                    "bias": False,
                    "pixel_shuffle": config["mp_pixel_shuffle_factor"],
                },
                "fusion": "language-stream",
                "language_model": {"name": checkpoint.name},
                "added_tokens": list(extra.values()),
                "trainable": [
                    "vision_encoder",
                    "vision_tokenizer",
                    "language_model",
                    *(["added_tokens"] if has_rows else []),
                ],
            },
            places=lambda ours: _places(ours, config["lm_vocab_size"], has_head=_has_head(checkpoint)),
            text_config=_text_config(config, base),
            vision_config=siglip_vision_config(vision, plain),
            tokenizer=config.get("lm_tokenizer"),
            optional_pattern=SIGLIP_UNNEEDED if has_rows else rf"{SIGLIP_UNNEEDED}|added_tokens\..*",
            notes=tuple(notes),
        )


def _check(checkpoint: PublishedCheckpoint) -> None:
    """
    Raises:
        CheckpointError: for numbers that a composition of ours has no place for, or that contradict each other.
    """
    config = checkpoint.config
    if config.get("vit_cls_flag"):
        raise CheckpointError(f"{checkpoint.name!r} reads one class token of an image (vit_cls_flag), not its patches.")
    if (scale := config.get("lm_attn_scaling", 1.0)) != 1.0:
        raise CheckpointError(f"{checkpoint.name!r} scales rotary positions by lm_attn_scaling={scale}; LLaMA has 1.0.")
    s, width = config["mp_pixel_shuffle_factor"], config["vit_hidden_dim"]
    if (given := checkpoint.shape("MP.proj.weight")[1]) != s**2 * width:
        raise CheckpointError(
            f"{checkpoint.name!r} projects {given} channels, not those of mp_pixel_shuffle_factor={s} squared times "
            f"vit_hidden_dim={width}."
        )
    tokens = (config["vit_img_size"] // config["vit_patch_size"] // s) ** 2
    if (given := config.get("mp_image_token_length", tokens)) != tokens:
        raise CheckpointError(
            f"{checkpoint.name!r} gives {tokens} vectors for an image of {config['vit_img_size']} pixels, and its "
            f"mp_image_token_length is {given}."
        )


def _text_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Transformers' configuration of the decoder, which is LLaMA's.

    Its ends are those of the tokenizer.
    """
    return {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": config["lm_hidden_dim"],
        "intermediate_size": config["lm_inter_dim"],
        "num_hidden_layers": config["lm_n_blocks"],
        "num_attention_heads": config["lm_n_heads"],
        "num_key_value_heads": config["lm_n_kv_heads"],
        "rms_norm_eps": config["lm_rms_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config["lm_re_base"])},
        "max_position_embeddings": config["lm_max_position_embeddings"],
        "attention_dropout": config.get("lm_dropout", 0.0),
        "tie_word_embeddings": config.get("lm_tie_weights", True),
        "bos_token_id": None,
        "eos_token_id": config.get("lm_eos_token_id"),
        "pad_token_id": None,
    }


def _has_head(checkpoint: PublishedCheckpoint) -> dict[str, bool]:
    """Which of the two tables are in the file: of tied ones, safetensors keeps one."""
    return {
        "embedding": "decoder.token_embedding.weight" in checkpoint.tensors,
        "head": "decoder.head.weight" in checkpoint.tensors,
    }


def _places(config: VLMConfig, rows: int, *, has_head: Mapping[str, bool]) -> TargetsOf:
    first, text = config.first_added_id, config.get_text_config(decoder=True)
    known = min(rows - first, len(config.added_tokens))  # of our added tokens, so many have a row
    new = len(config.added_tokens) - known

    def added(kind: str) -> list[Target]:
        if known <= 0:
            return []
        target = f"added_tokens.{kind}.weight"
        mine = [Target(target, target_rows=slice(known), source_rows=slice(first, rows))]
        return (
            [*mine, Target(target, target_rows=slice(known, None), transform=mean_rows(first, new))]
            if new > 0
            else mine
        )

    def table(target: str, kind: str, other: str) -> Any:
        kinds = [kind] if has_head[other] or not text.tie_word_embeddings else [kind, other]
        return lambda _: [
            Target(target, source_rows=slice(text.vocab_size)),
            *(place for x in kinds for place in added(x)),
        ]

    block, layer = r"vision_encoder\.blocks\.(\d+)\.", r"decoder\.blocks\.(\d+)\."
    ours, theirs = rf"{_TRUNK}blocks.\1.", rf"{_LM}layers.\1."
    return renamer(
        [
            (r"vision_encoder\.patch_embedding\.conv\.(\w+)", rf"{_TRUNK}patch_embed.proj.\1"),
            (r"vision_encoder\.patch_embedding\.position_embedding", f"{_TRUNK}pos_embed"),
            (r"vision_encoder\.layer_norm\.(\w+)", rf"{_TRUNK}norm.\1"),
            (rf"{block}ln([12])\.(\w+)", rf"{ours}norm\2.\3"),
            (rf"{block}attn\.qkv_proj\.(\w+)", rf"{ours}attn.qkv.\2"),
            (rf"{block}attn\.out_proj\.(\w+)", rf"{ours}attn.proj.\2"),
            (rf"{block}mlp\.(fc[12])\.(\w+)", rf"{ours}mlp.\2.\3"),
            (r"MP\.proj\.weight", "vision_tokenizer.proj.weight"),
            (r"decoder\.token_embedding\.weight", table(f"{_LM}embed_tokens.weight", "embedding", "head")),
            (r"decoder\.head\.weight", table("lang_model.lm_head.weight", "head", "embedding")),
            (r"decoder\.rotary_embd\.inv_freq", None),  # follows from lm_re_base
            (rf"{layer}attn\.([qkv])_proj\.weight", rf"{theirs}self_attn.\2_proj.weight"),
            (rf"{layer}attn\.out_proj\.weight", rf"{theirs}self_attn.o_proj.weight"),
            (rf"{layer}(mlp\.\w+_proj)\.weight", rf"{theirs}\2.weight"),
            (rf"{layer}norm1\.weight", rf"{theirs}input_layernorm.weight"),
            (rf"{layer}norm2\.weight", rf"{theirs}post_attention_layernorm.weight"),
            (r"decoder\.norm\.weight", f"{_LM}norm.weight"),
        ]
    )
