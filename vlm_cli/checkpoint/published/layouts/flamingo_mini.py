"""flamingo-mini: Flamingo (https://arxiv.org/abs/2204.14198) over OPT and GPT-2.

Source: https://github.com/dhansmair/flamingo-mini, `flamingo_mini/modeling_flamingo.py`; its wiki has the sizes of the
published flamingo-mini and flamingo-tiny.

flamingo-mini marks an image by no token of its own: it writes the text `<image>`, which its tokenizer cuts into three
tokens (`<`, `image`, `>`), and text from the position of `<` on sees the image. vlm's `<image>` stands for that first
token, and has its embedding. So a prompt changes as follows, and the logits stay equal:

    flamingo-mini   <image>a dog         tokens  <        image  >  a  dog
    vlm             <image>image>a dog   tokens  <image>  image  >  a  dog
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, missing_config
from vlm_cli.checkpoint.published.shapes import count_layers, find_layers, find_shape, interval_of
from vlm_cli.checkpoint.published.tables import Table, known_and_new_targets, tables_filled
from vlm_cli.checkpoint.published.targets import Target, TargetsOf, make_targets_of, stack_rows
from vlm_cli.checkpoint.published.towers.clip import (
    CLIP_OPTIONAL,
    CLIP_TOWERS,
    convert_clip_config,
    make_clip_rules,
    read_clip_shapes,
)
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["FlamingoMini"]

END_OF_CAPTION = "<EOC>"  # the only token that flamingo-mini adds

_TOWER = r"flamingo\.vision_encoder\.vision_model\."
_LAYER = r"flamingo\.lm\.((?:decoder\.layers|h)\.(\d+))\."  # OPT's names, and GPT-2's
_BLOCK = r"flamingo\.lm\.(?:decoder\.layers|h)\.(\d+)\.xattn_block\."
_EMBEDDING = r"flamingo\.lm\.(decoder\.embed_tokens|wte)\.weight"
_HEAD = r"flamingo\.lm_head\.weight"

#: Defaults of `config.json`, which leaves them out.
_DEFAULTS: Mapping[str, Any] = {
    "lm": "gpt2",
    "clip_model_type": "openai/clip-vit-base-patch32",
    "xattn_every": 1,
    "xattn_dim_head": 64,
    "xattn_heads": 8,
    "xattn_ff_mult": 4,
    "xattn_act": "gelu",
    "resampler_depth": 6,
    "resampler_dim_head": 64,
    "resampler_heads": 8,
    "resampler_num_latents": 64,
    "resampler_num_time_embeds": 4,
    "resampler_ff_mult": 4,
    "resampler_act": "gelu",
}
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "sqrelu": "squared_relu"}

_NOTES = (
    f"This model's tokenizer cuts the text {MEDIA_TOKEN!r} into three tokens, and vlm's {MEDIA_TOKEN} stands "
    f"for the first. Write {MEDIA_TOKEN}image> before a caption, as in training.",
    "In vlm, a prompt without images skips the cross-attention blocks. In flamingo-mini it passes their "
    "feed-forward layers.",
)


class FlamingoMini:
    """`flamingo.resampler.*` and `flamingo.lm.*.xattn_block.*`, with the language model and perhaps the tower."""

    name = "flamingo-mini"
    source = "https://github.com/dhansmair/flamingo-mini/blob/main/flamingo_mini/modeling_flamingo.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the resampler's latents and a block."""
        names = checkpoint.tensors
        return "flamingo.resampler.latents" in names and any(re.match(_BLOCK, name) for name in names)

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read settings from `config.json`, which the tensors have to agree with."""
        if not checkpoint.config:
            raise missing_config(checkpoint, "flamingo-mini")
        config = {**_DEFAULTS, **checkpoint.config}
        _check_sizes(checkpoint, config)
        vision, encoder = _find_tower(checkpoint, config["clip_model_type"])
        return CheckpointDescription(
            composition={
                "family": "flamingo",
                "vision_encoder": encoder,
                "vision_tokenizer": {
                    "type": "perceiver",
                    "depth": config["resampler_depth"],
                    "num_heads": config["resampler_heads"],
                    "head_dim": config["resampler_dim_head"],
                    "num_latents": config["resampler_num_latents"],
                    "ff_mult": config["resampler_ff_mult"],
                    "activation": _convert_activation(checkpoint, config["resampler_act"]),
                    "max_num_frames": config["resampler_num_time_embeds"],
                },
                "fusion": {
                    "type": "cross-attention",
                    "every": config["xattn_every"],
                    "first": 0,
                    "num_heads": config["xattn_heads"],
                    "head_dim": config["xattn_dim_head"],
                    "ff_mult": config["xattn_ff_mult"],
                    "activation": _convert_activation(checkpoint, config["xattn_act"]),
                },
                "language_model": {"name": config["lm"]},
                "added_tokens": [END_OF_CAPTION, MEDIA_TOKEN],
            },
            targets_for=lambda ours: _make_targets(checkpoint, ours, 0 if vision is None else vision["hidden_size"]),
            holds_language_model=any(re.match(rf"{_LAYER}lm_block\.", name) for name in checkpoint.tensors),
            vision_config=None if vision is None else convert_clip_config(vision, checkpoint.folder),
            crops_down=True,
            initialize_like={MEDIA_TOKEN: "<"},
            optional_pattern=CLIP_OPTIONAL,
            notes=_NOTES,
        )


def _find_tower(checkpoint: PublishedCheckpoint, clip_name: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Find the vision encoder.

    Returns:
        Transformers' configuration of a CLIP tower in the files, or None; settings of `composition["vision_encoder"]`.
    """
    vision = read_clip_shapes(checkpoint, _TOWER, clip_name)
    openclip_name, pretrained = CLIP_TOWERS.get(clip_name, (None, None))
    encoder: dict[str, Any] = {"class_token": True, "norm": False}
    if vision is not None:
        encoder["name"] = openclip_name or "clip-vision-transformer"
    elif openclip_name is not None:
        encoder |= {"name": openclip_name, "pretrained": pretrained}
    return vision, encoder


def _convert_activation(checkpoint: PublishedCheckpoint, name: str) -> str:
    """Return vlm's name of an activation.

    Raises:
        CheckpointError: for another name than flamingo-mini has.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.name!r} has activation {name!r}; flamingo-mini knows {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _check_sizes(checkpoint: PublishedCheckpoint, config: Mapping[str, Any]) -> None:
    """Refuse a `config.json` that does not fit the tensors.

    Raises:
        CheckpointError: if it gives other heads, layers or blocks than the tensors have.
    """
    blocks, every = find_layers(checkpoint, _BLOCK), config["xattn_every"]
    if blocks[0] != 0 or interval_of(blocks, single=every) != every:
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention before layers {blocks}, not xattn_every={every}."
        )
    depth = count_layers(checkpoint, r"flamingo\.resampler\.layers\.(\d+)\.")
    if depth != config["resampler_depth"]:
        raise CheckpointError(f"{checkpoint.name!r} has {depth} resampler layers, not {config['resampler_depth']}.")
    for part, pattern in (
        ("resampler", r"flamingo\.resampler\.layers\.0\.0\.to_q\.weight"),
        ("xattn", rf"{_BLOCK}attn\.to_q\.weight"),
    ):
        shape = find_shape(checkpoint, pattern)
        assert shape is not None
        heads, width, inner = config[f"{part}_heads"], config[f"{part}_dim_head"], shape[0]
        if heads * width != inner:
            raise CheckpointError(
                f"{checkpoint.name!r} has attention of {inner} channels, not {part}_heads={heads} of "
                f"{part}_dim_head={width}."
            )


def _make_targets(checkpoint: PublishedCheckpoint, config: VLMConfig, vision_width: int) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration.

    Args:
        checkpoint: names and shapes.
        config: of the VLM.
        vision_width: channels of the vision encoder; any number if the checkpoint has none.
    """
    filled = tables_filled(checkpoint, config, embedding=_EMBEDDING, head=_HEAD)
    text, first = config.get_text_config(decoder=True), config.first_added_id
    base = slice(text.vocab_size)
    # `<EOC>` has the id after the tokenizer's last. OPT's table is padded, so this is not the row that was appended.
    eoc = slice(first, first + 1)
    lm = {"opt": "lang_model.model", "gpt2": "lang_model.transformer"}.get(text.model_type, "lang_model.model")
    resampler = config.composition.vision_tokenizer.options
    inner = resampler.num_heads * resampler.head_dim

    def fill_table(target: str, kind: Table) -> list[Target]:
        added = known_and_new_targets(filled[kind], eoc, num_known=1, num_added=len(config.added_tokens))
        return [Target(target, target_rows=base, source_rows=base), *added]

    def stack(match: re.Match[str]) -> list[Target]:
        return stack_rows(f"vision_tokenizer.{match[1]}.to_kv.{match[3]}", "kv", match[2], inner)

    return make_targets_of(
        [
            *make_clip_rules(_TOWER, vision_width),
            (
                r"flamingo\.resampler\.time_pos_emb",
                lambda _: [Target("vision_tokenizer.frame_embs", transform=_drop_axis)],
            ),
            (r"flamingo\.resampler\.(layers\.\d+\.0)\.to_([kv])\.(weight|bias)", stack),
            (r"flamingo\.resampler\.(.*)", r"vision_tokenizer.\1"),
            (rf"{_BLOCK}(attn\..*)", r"fusion.blocks.\1.\2"),
            (rf"{_BLOCK}ffw\.(.*)", r"fusion.blocks.\1.ff.\2"),
            (rf"{_BLOCK}alpha_attn", r"fusion.blocks.\1.attn_gate"),
            (rf"{_BLOCK}alpha_ffw", r"fusion.blocks.\1.ff_gate"),
            (rf"{_LAYER}(?:lm_block\.)?attn\.(?:masked_)?bias", None),  # causal masks of older releases of GPT-2
            (rf"{_LAYER}lm_block\.(.*)", rf"{lm}.\1.\3"),
            (_EMBEDDING, lambda match: fill_table(f"{lm}.{match[1]}.weight", "embedding")),
            (r"flamingo\.lm\.(.*)", rf"{lm}.\1"),
            (_HEAD, lambda _: fill_table("lang_model.lm_head.weight", "head")),
        ]
    )


def _drop_axis(x: Tensor) -> Tensor:
    """float[F, 1, d] -> float[F, d]."""
    return x.squeeze(1)
