"""nanoVLM: SigLIP, a pixel shuffle with a linear projection, and SmolLM2.

Source: https://github.com/huggingface/nanoVLM, `models/`; v0.1 wrote nanoVLM-222M, `main` the later ones.

In v0.1 an image has no token: its 49 vectors stand before the text. vlm's `<image>` is then an added token that marks
the position, and nothing reads its row. Later models have one token for each vector, and one that announces each tile
and the whole image; vlm's `<image>` replaces the former, and its tiling writes the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, missing_config
from vlm_cli.checkpoint.published.tables import Table, known_and_new_targets, tables_filled
from vlm_cli.checkpoint.published.targets import Target, TargetsOf, make_targets_of
from vlm_cli.checkpoint.published.towers.siglip import SIGLIP_OPTIONAL, convert_siglip_config, name_siglip_tower
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.schema import show

__all__ = ["NanoVLM"]

_TRUNK, _LM = "vision_encoder.visual.trunk.", "lang_model.model."


class NanoVLM:
    """`vision_encoder.*`, `MP.proj` and `decoder.*`, with a `config.json` of `vit_…`, `lm_…` and `mp_…`."""

    name = "nanoVLM"
    source = "https://github.com/huggingface/nanoVLM/blob/main/models/vision_language_model.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for a tensor of each of the three modules."""
        return {"MP.proj.weight", "decoder.norm.weight", "vision_encoder.patch_embedding.conv.weight"} <= set(
            checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts."""
        config = checkpoint.config
        if "lm_n_heads" not in config:
            raise missing_config(checkpoint, "nanoVLM")
        _check_config(checkpoint)
        vision, vision_config = _read_tower(config)
        extra = {**(config.get("vlm_extra_tokens") or {}), "image_token": MEDIA_TOKEN}
        base = config.get("lm_base_vocab_size", config["lm_vocab_size"])
        has_rows = config["lm_vocab_size"] > base
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": name_siglip_tower(vision)},
                "vision_tokenizer": {
                    "type": "linear",
                    "bias": False,
                    "pixel_shuffle": config["mp_pixel_shuffle_factor"],
                },
                "fusion": "language-stream",
                **({"tiling": _read_tiling(checkpoint)} if _is_tiled(config) else {}),
                "language_model": {"name": checkpoint.name},
                "added_tokens": list(extra.values()),
                "trainable": [
                    "vision_encoder",
                    "vision_tokenizer",
                    "language_model",
                    *(["added_tokens"] if has_rows else []),
                ],
            },
            targets_for=lambda ours: _make_targets(checkpoint, ours),
            text_config=_convert_text_config(config, base),
            vision_config=vision_config,
            tokenizer=config.get("lm_tokenizer"),
            chat_template=config.get("lm_chat_template"),
            optional_pattern=SIGLIP_OPTIONAL if has_rows else rf"{SIGLIP_OPTIONAL}|added_tokens\..*",
            notes=_list_notes(config),
        )


#: Settings that are read, that shapes tell, or that change no output of a trained model.
_KNOWN = {
    *("vit_hidden_dim", "vit_inter_dim", "vit_patch_size", "vit_img_size", "vit_n_heads", "vit_dropout"),
    *("vit_n_blocks", "vit_ln_eps", "vit_cls_flag", "vit_model_type", "lm_hidden_dim", "lm_inter_dim", "lm_rms_eps"),
    *("lm_re_base", "lm_max_position_embeddings", "lm_base_vocab_size", "lm_vocab_size", "lm_n_heads"),
    *("lm_n_kv_heads", "lm_dropout", "lm_n_blocks", "lm_attn_scaling", "lm_max_length", "lm_use_tokens"),
    *("lm_tie_weights", "lm_model_type", "lm_tokenizer", "lm_chat_template", "lm_eos_token_id"),
    *("mp_pixel_shuffle_factor", "mp_image_token_length", "vlm_extra_tokens", "vlm_load_backbone_weights"),
    *("vlm_checkpoint_path", "vlm_tokenizer"),
}


def _is_tiled(config: Mapping[str, Any]) -> bool:
    """Say whether the model was trained on tiles of images."""
    return "max_img_size" in config


def _read_tiling(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Read how images are cut, and which token announces each view.

    Raises:
        CheckpointError: if a tile has no token, or tokens of other names than vlm writes.
    """
    config, extra = checkpoint.config, checkpoint.config.get("vlm_extra_tokens") or {}
    edge, tile = config["max_img_size"], config["vit_img_size"]
    side = -(-edge // tile)
    tokens = {f"r{row}c{column}": (row, column) for row in range(1, side + 1) for column in range(1, side + 1)}
    for name, (row, column) in tokens.items():
        if extra.get(name) != _TILE.format(row=row, column=column):
            raise CheckpointError(
                f"{checkpoint.name!r} cuts images of {edge} pixels into tiles of {tile}, up to {side} in a row. The "
                f"tile in row {row} and column {column} is announced by vlm_extra_tokens.{name}, which must be "
                f"{_TILE.format(row=row, column=column)!r}, and is {show(extra.get(name))}."
            )
    whole = extra.get("global_image_token")
    return {
        "type": "split",
        "rules": "nanovlm",
        "longest_edge": edge,
        "enlarge": config.get("resize_to_max_side_len", True),
        "thumbnail": "none" if whole is None else "first",
        "tile_text": _TILE + "{image}",
        "thumbnail_text": "{image}" if whole is None else whole + "{image}",
        # A model without a token for the whole image announces an image of one tile as that tile.
        "whole_text": (_TILE.format(row=1, column=1) if whole is None else whole) + "{image}",
    }


_TILE = "<row_{row}_col_{column}>"


def _read_tower(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the vision encoder's configuration in Transformers' words, and OpenCLIP's."""
    vision = {
        "hidden_size": config["vit_hidden_dim"],
        "num_hidden_layers": config["vit_n_blocks"],
        "num_attention_heads": config["vit_n_heads"],
        "patch_size": config["vit_patch_size"],
        "image_size": config["vit_img_size"],
        "layer_norm_eps": config["vit_ln_eps"],
    }
    # nanoVLM does not normalize pixels, although SigLIP's training did.
    interpolation = "bicubic" if _is_tiled(config) else "bilinear"
    return vision, convert_siglip_config(
        vision, {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": interpolation}
    )


def _list_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the user should know about prompts for this model."""
    notes = []
    if _is_tiled(config):
        notes.append(
            "nanoVLM numbers the pictures of a prompt that has several: write <image: 0> before the first, as text."
        )
    if "image_token" not in (config.get("vlm_extra_tokens") or {}):
        notes.append(f"This model was trained with the image first: {MEDIA_TOKEN}Question: … Answer:")
    return tuple(notes)


def _check_config(checkpoint: PublishedCheckpoint) -> None:
    """Refuse settings that vlm cannot build, and numbers that contradict each other.

    Raises:
        CheckpointError: names the setting.
    """
    config = checkpoint.config
    for name, value in config.items():
        if name.startswith(("vit_", "lm_", "mp_", "vlm_")) and name not in _KNOWN:
            raise CheckpointError(f"{checkpoint.name!r} has {name}={show(value)}, a setting that vlm does not know.")
    if not isinstance(template := config.get("lm_chat_template"), (str, type(None))):
        raise CheckpointError(f"{checkpoint.name!r} has lm_chat_template={show(template)}, which is no text.")
    if config.get("vit_cls_flag"):
        raise CheckpointError(
            f"{checkpoint.name!r} reads one class token of an image (vit_cls_flag); vlm reads patches."
        )
    if (scale := config.get("lm_attn_scaling", 1.0)) != 1.0:
        raise CheckpointError(f"{checkpoint.name!r} scales rotary positions by lm_attn_scaling={scale}; LLaMA has 1.0.")
    s, width = config["mp_pixel_shuffle_factor"], config["vit_hidden_dim"]
    if (given := checkpoint.shape("MP.proj.weight")[1]) != s**2 * width:
        raise CheckpointError(
            f"{checkpoint.name!r} projects {given} channels; mp_pixel_shuffle_factor={s} squared times "
            f"vit_hidden_dim={width} is {s**2 * width}."
        )
    tokens = (config["vit_img_size"] // config["vit_patch_size"] // s) ** 2
    if (given := config.get("mp_image_token_length", tokens)) != tokens:
        raise CheckpointError(
            f"{checkpoint.name!r} makes {tokens} vectors of an image of {config['vit_img_size']} pixels, but its "
            f"mp_image_token_length is {given}."
        )


def _convert_text_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Turn nanoVLM's settings of its decoder into Transformers' configuration of a LLaMA.

    Token ids of beginning and padding are left to the tokenizer.

    Args:
        config: content of `config.json`.
        rows: of the vocabulary before tokens were added.
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


_EMBEDDING, _HEAD = r"decoder\.token_embedding\.weight", r"decoder\.head\.weight"


def _make_targets(checkpoint: PublishedCheckpoint, config: VLMConfig) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration."""
    filled = tables_filled(checkpoint, config, embedding=_EMBEDDING, head=_HEAD)
    base = slice(config.get_text_config(decoder=True).vocab_size)
    rows = slice(config.first_added_id, checkpoint.config["lm_vocab_size"])  # of added tokens
    num_added = len(config.added_tokens)
    num_known = min(rows.stop - rows.start, num_added)

    def fill_table(target: str, kind: Table) -> list[Target]:
        tables = filled[kind] if num_known > 0 else ()
        added = known_and_new_targets(tables, rows, num_known=num_known, num_added=num_added)
        return [Target(target, target_rows=base, source_rows=base), *added]

    block, layer = r"vision_encoder\.blocks\.(\d+)\.", r"decoder\.blocks\.(\d+)\."
    ours_block, ours_layer = rf"{_TRUNK}blocks.\1.", rf"{_LM}layers.\1."
    return make_targets_of(
        [
            (r"vision_encoder\.patch_embedding\.conv\.(\w+)", rf"{_TRUNK}patch_embed.proj.\1"),
            (r"vision_encoder\.patch_embedding\.position_embedding", f"{_TRUNK}pos_embed"),
            (r"vision_encoder\.layer_norm\.(\w+)", rf"{_TRUNK}norm.\1"),
            (rf"{block}ln([12])\.(\w+)", rf"{ours_block}norm\2.\3"),
            (rf"{block}attn\.qkv_proj\.(\w+)", rf"{ours_block}attn.qkv.\2"),
            (rf"{block}attn\.out_proj\.(\w+)", rf"{ours_block}attn.proj.\2"),
            (rf"{block}mlp\.(fc[12])\.(\w+)", rf"{ours_block}mlp.\2.\3"),
            (r"MP\.proj\.weight", "vision_tokenizer.proj.weight"),
            (_EMBEDDING, lambda _: fill_table(f"{_LM}embed_tokens.weight", "embedding")),
            (_HEAD, lambda _: fill_table("lang_model.lm_head.weight", "head")),
            (r"decoder\.rotary_embd\.inv_freq", None),  # computed from lm_re_base
            (rf"{layer}attn\.([qkv])_proj\.weight", rf"{ours_layer}self_attn.\2_proj.weight"),
            (rf"{layer}attn\.out_proj\.weight", rf"{ours_layer}self_attn.o_proj.weight"),
            (rf"{layer}(mlp\.\w+_proj)\.weight", rf"{ours_layer}\2.weight"),
            (rf"{layer}norm1\.weight", rf"{ours_layer}input_layernorm.weight"),
            (rf"{layer}norm2\.weight", rf"{ours_layer}post_attention_layernorm.weight"),
            (r"decoder\.norm\.weight", f"{_LM}norm.weight"),
        ]
    )
