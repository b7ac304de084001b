"""BLIP-2 over a causal language model (https://arxiv.org/abs/2301.12597), as Transformers and as LAVIS write it.

Sources: transformers/models/blip_2, `Blip2ForConditionalGeneration` and convert_blip_2_original_to_pytorch.py;
https://github.com/salesforce/LAVIS, `lavis/models/blip2_models/blip2_opt.py`.

LAVIS's names are read as Transformers', and these have places. The last norm of the tower is LAVIS's `ln_vision`; it
has epsilon 1e-5 there, and 1e-6 in Transformers, timm and here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Target, TargetsOf, number_of, renamer
from vlm_cli.checkpoint.published.towers.eva import EVA_UNNEEDED, eva_table, eva_tower
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["HuggingFaceBLIP2", "LavisBLIP2"]

_TOWER = "vision_model."
_ADDED = r"added_tokens\.(?:embedding|head)\.\w+"
#: What the parts that are built here do, and a configuration could ask otherwise.
_FIXED = (
    ("vision_config", "hidden_act", "gelu"),
    ("vision_config", "qkv_bias", True),
    ("qformer_config", "hidden_act", "gelu"),
)
_ORDER = (
    "BLIP-2 read the image before the token that begins a text (</s>); a tokenizer of vlm writes that token first, so "
    "answers may differ from those of BLIP-2's own code."
)


class HuggingFaceBLIP2:
    """`vision_model`, `qformer`, `language_projection` and `language_model`, with a `config.json` of type `blip-2`."""

    name = "BLIP-2 (Hugging Face)"
    source = "transformers/models/blip_2/modeling_blip_2.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        wanted = {"query_tokens", "language_projection.weight"}
        return checkpoint.config.get("model_type") == "blip-2" and wanted <= checkpoint.tensors.keys()

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        config = checkpoint.config
        for part, name, fixed in _FIXED:
            if (given := config.get(part, {}).get(name, fixed)) != fixed:
                raise CheckpointError(f"{checkpoint.name!r} has {part}.{name}={given!r}; vlm has {fixed!r} there.")
        vision, vision_config = eva_tower(
            checkpoint, _TOWER, config.get("vision_config", {}).get("num_attention_heads", 16), checkpoint.folder
        )
        text = {"model_type": "opt", **config.get("text_config", {})}
        # Older files have no media token: image features stand before the text.
        media_id = config.get("image_token_index")
        return CheckpointDescription(
            composition={
                **_composition(checkpoint, config.get("qformer_config", {}).get("num_attention_heads", 12)),
                "vision_encoder": {**vision, "class_token": True, "norm": True},
                "language_model": {"name": checkpoint.name},
            },
            places=lambda ours: _places(ours, checkpoint),
            text_config=text,
            vision_config=vision_config,
            first_added_id=media_id,
            optional_pattern=EVA_UNNEEDED if media_id is not None else f"{EVA_UNNEEDED}|{_ADDED}",
            notes=(_ORDER,),
        )


class LavisBLIP2:
    """`Qformer.bert`, `ln_vision` and `opt_proj`, and, where they were trained, `visual_encoder` and `opt_model`."""

    name = "BLIP-2 (LAVIS)"
    source = "https://github.com/salesforce/LAVIS/blob/main/lavis/models/blip2_models/blip2_opt.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        return {"query_tokens", "opt_proj.weight"} <= checkpoint.tensors.keys()

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        renamed = replace(checkpoint, tensors={_huggingface(name): x for name, x in checkpoint.tensors.items()})
        # The Q-Former is BERT's, whose heads have 64 channels at every size.
        composition = _composition(renamed, renamed.shape("query_tokens")[2] // 64)
        notes = [_ORDER]
        vision_config, vision = None, {"name": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k", "depth": 39}
        if f"{_TOWER}embeddings.patch_embedding.weight" in renamed.tensors:
            vision, vision_config = eva_tower(renamed, _TOWER)
        else:
            notes.append(
                "The checkpoint does not hold the vision encoder that it was trained over (LAVIS's eva_vit_g). "
                "OpenCLIP's EVA01-g-14 is the same network; whether its weights are the same was not verified. Other "
                "weights: --set vision_encoder.pretrained=FILE. With another name, set depth, class_token and norm too."
            )
        composition["vision_encoder"] = {**vision, "class_token": True, "norm": True}
        width = renamed.shape("language_projection.weight")[0]
        if (known := _LANGUAGE_MODELS.get(width)) is not None:
            composition["language_model"] = {"name": known}
        notes.append(
            f"The checkpoint does not name its language model; by its width of {width} channels it is "
            f"{known or 'none of the published'}. BLIP-2 ended its answers at a line break."
        )

        def places(ours: VLMConfig) -> TargetsOf:
            of_huggingface = _places(ours, renamed)
            return lambda name: of_huggingface(_huggingface(name))

        return CheckpointDescription(
            composition=composition,
            places=places,
            holds_language_model="language_model.model.decoder.embed_tokens.weight" in renamed.tensors,
            vision_config=vision_config,
            optional_pattern=f"{EVA_UNNEEDED}|{_ADDED}",
            notes=tuple(notes),
        )


#: Channels of the language model's embeddings -> the language model that was published with them.
_LANGUAGE_MODELS = {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"}

#: LAVIS's names -> Transformers'.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"visual_encoder\.cls_token", rf"{_TOWER}embeddings.class_embedding"),
        (r"visual_encoder\.pos_embed", rf"{_TOWER}embeddings.position_embedding"),
        (r"visual_encoder\.patch_embed\.proj\.(\w+)", rf"{_TOWER}embeddings.patch_embedding.\1"),
        (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)", rf"{_TOWER}encoder.layers.\1.layer_norm\2.\3"),
        (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", rf"{_TOWER}encoder.layers.\1.self_attn.projection.\2"),
        (r"visual_encoder\.blocks\.(\d+)\.attn\.(.*)", rf"{_TOWER}encoder.layers.\1.self_attn.\2"),
        (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.*)", rf"{_TOWER}encoder.layers.\1.mlp.\2"),
        (r"ln_vision\.(\w+)", rf"{_TOWER}post_layernorm.\1"),
        (r"Qformer\.bert\.embeddings\.LayerNorm\.(\w+)", r"qformer.layernorm.\1"),
        (r"Qformer\.bert\.(.*attention)\.self\.(.*)", r"qformer.\1.attention.\2"),
        (r"Qformer\.(?:bert\.)?(.*)", r"qformer.\1"),
        (r"opt_proj\.(\w+)", r"language_projection.\1"),
        (r"opt_model\.(.*)", r"language_model.\1"),
    )
)


def _huggingface(name: str) -> str:
    """Transformers' name of a tensor of LAVIS.

    >>> _huggingface("Qformer.bert.encoder.layer.0.crossattention.self.key.bias")
    'qformer.encoder.layer.0.crossattention.attention.key.bias'
    """
    for pattern, replacement in _RENAMES:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return name


def _composition(checkpoint: PublishedCheckpoint, num_heads: int) -> dict[str, Any]:
    """What is the same in both: the Q-Former, whose sizes its tensors tell."""
    layer = r"qformer\.encoder\.layer\.(\d+)\."
    depth = number_of(checkpoint, layer)
    crossing = sorted(
        {int(match[1]) for name in checkpoint.tensors if (match := re.match(rf"{layer}crossattention\.", name))}
    )
    every = crossing[1] if len(crossing) > 1 else depth
    if crossing != list(range(0, depth, every)):
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention in layers {crossing} of its {depth}, which are not regular."
        )
    _, num_queries, dim = checkpoint.shape("query_tokens")
    return {
        "family": "blip",
        "vision_tokenizer": {
            "type": "qformer",
            "num_queries": num_queries,
            "depth": depth,
            "dim": dim,
            "num_heads": num_heads,
            "dim_ff": checkpoint.shape("qformer.encoder.layer.0.intermediate_query.dense.weight")[0],
            "cross_attention_every": every,
        },
        "fusion": "language-stream",
        "added_tokens": [MEDIA_TOKEN],
        "trainable": ["vision_tokenizer", "added_tokens"],
    }


def _places(ours: VLMConfig, checkpoint: PublishedCheckpoint) -> TargetsOf:
    """Where tensors under Transformers' names go."""
    tensors: Mapping[str, Any] = checkpoint.tensors
    patches = tensors.get(f"{_TOWER}embeddings.patch_embedding.weight")
    return renamer(
        [
            *eva_table(re.escape(_TOWER), 0 if patches is None else patches.shape[0]),
            (r"query_tokens", "vision_tokenizer.query_tokens"),
            # The branch that reads text serves retrieval, and pretraining before there is a language model.
            (r"qformer\.(?:embeddings|cls)\..*", None),
            (r"qformer\.encoder\.layer\.\d+\.(?:intermediate|output)\..*", None),
            (r"qformer\.(.*)", r"vision_tokenizer.qformer.\1"),
            (r"language_projection\.(\w+)", r"vision_tokenizer.proj.\1"),
            (r"language_model\.(.*embed_tokens)\.weight", _table(ours, checkpoint, head=False)),
            (r"language_model\.(lm_head)\.weight", _table(ours, checkpoint, head=True)),
            (r"language_model\.(.*)", r"lang_model.\1"),
        ]
    )


def _table(ours: VLMConfig, checkpoint: PublishedCheckpoint, *, head: bool) -> Any:
    """TargetsOf of a table of the language model, which may hold the media token as a row of its own."""
    end = ours.first_added_id + len(ours.added_tokens)
    added = slice(ours.first_added_id, end)
    is_tied = "language_model.lm_head.weight" not in checkpoint.tensors

    def places(match: Any) -> list[Target]:
        found = [Target(f"lang_model.{match[1]}.weight")]
        if checkpoint.shape(f"language_model.{match[1]}.weight")[0] >= end:
            wanted = ["head"] if head else ["embedding", "head"] if is_tied else ["embedding"]
            found += [Target(f"added_tokens.{name}.weight", source_rows=added) for name in wanted]
        return found

    return places
