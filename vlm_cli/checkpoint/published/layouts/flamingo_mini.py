"""flamingo-mini: Flamingo (https://arxiv.org/abs/2204.14198) over OPT and GPT-2.

Source: https://github.com/dhansmair/flamingo-mini, `flamingo_mini/modeling_flamingo.py`; its wiki has the sizes of the
published flamingo-mini and flamingo-tiny.

Its marker of an image is no token: it is the text `<image>`, which the tokenizer cuts in three (`<`, `image`, `>`), and
from the position of `<` on, text sees the image. Our `<image>` is that first token: it stands at its position and has
its embedding, so that `<image>image>…` here is what `<image>…` is there, to the last logit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import (
    CheckpointDescription,
    Target,
    TargetsOf,
    mean_rows,
    number_of,
    renamer,
)
from vlm_cli.checkpoint.published.towers.clip import CLIP_UNNEEDED, clip_table, clip_vision_config
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["FlamingoMini"]

END_OF_CAPTION = "<EOC>"  # the one token that is added there

_VISION = r"flamingo\.vision_encoder\."
_LAYER = r"flamingo\.lm\.((?:decoder\.layers|h)\.(\d+))\."
_CLIP_HEAD_WIDTH = 64  # channels; of every CLIP that OpenAI published

#: Values of a field that `config.json` does not name, because it is the default.
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
_TOWERS = {
    "openai/clip-vit-base-patch32": "ViT-B-32",
    "openai/clip-vit-base-patch16": "ViT-B-16",
    "openai/clip-vit-large-patch14": "ViT-L-14",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336",
}


class FlamingoMini:
    """`flamingo.resampler.*` and `flamingo.lm.*.xattn_block.*`, with the language model and perhaps the tower."""

    name = "flamingo-mini"
    source = "https://github.com/dhansmair/flamingo-mini/blob/main/flamingo_mini/modeling_flamingo.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        names = checkpoint.tensors
        return "flamingo.resampler.latents" in names and any(re.match(rf"{_LAYER}xattn_block\.", x) for x in names)

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        if not checkpoint.config:
            raise CheckpointError(
                f"{checkpoint.name!r} has no config.json, and its tensors do not say how many heads there are. Give "
                "the directory that holds both."
            )
        config = {**_DEFAULTS, **checkpoint.config}
        _check_sizes(checkpoint, config)
        vision_config, width = _vision_config(checkpoint)
        tower = _TOWERS.get(config["clip_model_type"])
        encoder: dict[str, Any] = {"class_token": True, "norm": False}
        if vision_config is not None:
            encoder["name"] = tower or "clip-vision-transformer"
        elif tower is not None:
            encoder |= {"name": tower, "pretrained": "openai"}
        notes = (
            f"{MEDIA_TOKEN} stands for the first of the three tokens that the text {MEDIA_TOKEN!r} has in this model. "
            f"Write {MEDIA_TOKEN}image> before a caption, and the model reads what it was trained with.",
            "There, a prompt without any image passes through the feed-forwards of the blocks; here, it does not.",
        )
        head = "flamingo.lm_head.weight" in checkpoint.tensors
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
                    "activation": _activation(checkpoint, config["resampler_act"]),
                    "max_num_frames": config["resampler_num_time_embeds"],
                },
                "fusion": {
                    "type": "cross-attention",
                    "every": config["xattn_every"],
                    "first": 0,
                    "num_heads": config["xattn_heads"],
                    "head_dim": config["xattn_dim_head"],
                    "ff_mult": config["xattn_ff_mult"],
                    "activation": _activation(checkpoint, config["xattn_act"]),
                },
                "language_model": {"name": config["lm"]},
                "added_tokens": [END_OF_CAPTION, MEDIA_TOKEN],
            },
            places=lambda ours: _places(ours, width, has_head=head),
            holds_language_model=any(re.match(rf"{_LAYER}lm_block\.", name) for name in checkpoint.tensors),
            vision_config=vision_config,
            initialize_like={MEDIA_TOKEN: "<"},
            optional_pattern=CLIP_UNNEEDED,
            notes=notes,
        )


def _activation(checkpoint: PublishedCheckpoint, name: str) -> str:
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.name!r} has activation {name!r}; flamingo-mini has {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _check_sizes(checkpoint: PublishedCheckpoint, config: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: if `config.json` gives other heads, layers or blocks than the tensors have.
    """
    blocks = sorted({int(m[2]) for x in checkpoint.tensors if (m := re.match(rf"{_LAYER}xattn_block\.", x))})
    every = config["xattn_every"]
    if blocks != list(range(0, blocks[-1] + 1, every)):
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention before layers {blocks}, not xattn_every={every}."
        )
    depth = number_of(checkpoint, r"flamingo\.resampler\.layers\.(\d+)\.")
    if depth != config["resampler_depth"]:
        raise CheckpointError(f"{checkpoint.name!r} has {depth} resampler layers, not {config['resampler_depth']}.")
    for part, name in (
        ("resampler", "flamingo.resampler.layers.0.0.to_q.weight"),
        ("xattn", next(x for x in checkpoint.tensors if x.endswith("xattn_block.attn.to_q.weight"))),
    ):
        heads, width, inner = config[f"{part}_heads"], config[f"{part}_dim_head"], checkpoint.shape(name)[0]
        if heads * width != inner:
            raise CheckpointError(
                f"{checkpoint.name!r} has attention of {inner} channels, not {part}_heads={heads} of "
                f"{part}_dim_head={width}."
            )


def _vision_config(checkpoint: PublishedCheckpoint) -> tuple[dict[str, Any] | None, int]:
    """OpenCLIP's configuration of the tower, by its shapes, and its channels; None if the checkpoint has none."""
    prefix = "flamingo.vision_encoder.vision_model."
    table = f"{prefix}embeddings.position_embedding.weight"
    if table not in checkpoint.tensors:
        return None, 0
    (positions, width), patch = checkpoint.shape(table), checkpoint.shape(f"{prefix}embeddings.patch_embedding.weight")
    config = {
        "hidden_size": width,
        "intermediate_size": checkpoint.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": number_of(checkpoint, rf"{_VISION}vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // _CLIP_HEAD_WIDTH,
        "patch_size": patch[-1],
        "image_size": round((positions - 1) ** 0.5) * patch[-1],
    }
    return clip_vision_config(config, checkpoint.folder), width


def _places(config: VLMConfig, width: int, *, has_head: bool) -> TargetsOf:
    first, new = config.first_added_id, len(config.added_tokens) - 1
    text = config.get_text_config(decoder=True)
    base = text.vocab_size
    inside = {"opt": "model", "gpt2": "transformer"}.get(text.model_type, "model")

    def added(target: str) -> list[Target]:
        # `<EOC>` is the id after the tokenizer's last; in OPT's padded table that is not the row that was appended.
        return [
            Target(f"added_tokens.{target}.weight", target_rows=slice(1), source_rows=slice(first, first + 1)),
            Target(f"added_tokens.{target}.weight", target_rows=slice(1, None), transform=mean_rows(first, new)),
        ]

    def embedding(match: Any) -> list[Target]:
        table = [Target(f"lang_model.{inside}.{match[1]}.weight", source_rows=slice(base)), *added("embedding")]
        return table if has_head else [*table, *added("head")]  # they are tied

    inner = r"(weight|bias)"
    return renamer(
        [
            *clip_table(rf"{_VISION}vision_model\.", width),
            (
                r"flamingo\.resampler\.time_pos_emb",
                lambda _: [Target("vision_tokenizer.frame_embs", transform=_without_one)],
            ),
            (rf"flamingo\.resampler\.(layers\.\d+\.0)\.to_k\.{inner}", lambda m: [_half(m, 0, config)]),
            (rf"flamingo\.resampler\.(layers\.\d+\.0)\.to_v\.{inner}", lambda m: [_half(m, 1, config)]),
            (r"flamingo\.resampler\.(.*)", r"vision_tokenizer.\1"),
            (rf"{_LAYER}xattn_block\.(attn\..*)", r"fusion.blocks.\2.\3"),
            (rf"{_LAYER}xattn_block\.ffw\.(.*)", r"fusion.blocks.\2.ff.\3"),
            (rf"{_LAYER}xattn_block\.alpha_attn", r"fusion.blocks.\2.attn_gate"),
            (rf"{_LAYER}xattn_block\.alpha_ffw", r"fusion.blocks.\2.ff_gate"),
            (rf"{_LAYER}(?:lm_block\.)?attn\.(?:masked_)?bias", None),  # GPT-2's causal masks, of older releases
            (rf"{_LAYER}lm_block\.(.*)", rf"lang_model.{inside}.\1.\3"),
            (r"flamingo\.lm\.(decoder\.embed_tokens|wte)\.weight", embedding),
            (r"flamingo\.lm\.(.*)", rf"lang_model.{inside}.\1"),
            (
                r"flamingo\.lm_head\.weight",
                lambda _: [Target("lang_model.lm_head.weight", source_rows=slice(base)), *added("head")],
            ),
        ]
    )


def _half(match: Any, number: int, config: VLMConfig) -> Target:
    """Keys or values, which are one matrix here: keys first."""
    options = config.composition.vision_tokenizer.options
    rows = options.num_heads * options.head_dim
    return Target(
        f"vision_tokenizer.{match[1]}.to_kv.{match[2]}", target_rows=slice(number * rows, (number + 1) * rows)
    )


def _without_one(x: Tensor) -> Tensor:
    """float[F, 1, d] -> float[F, d]."""
    return x.squeeze(1)
