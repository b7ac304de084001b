"""BLIP-2 over a causal language model (https://arxiv.org/abs/2301.12597), as Transformers and as LAVIS write it.

Sources: transformers/models/blip_2, `Blip2ForConditionalGeneration` and convert_blip_2_original_to_pytorch.py;
https://github.com/salesforce/LAVIS, `lavis/models/blip2_models/blip2_opt.py`.

LAVIS's names are turned into Transformers' first, for which the rules are written. LAVIS's `ln_vision` is the tower's
last norm; its epsilon is 1e-5 there, and 1e-6 in Transformers, timm and vlm.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.parts import read_qformer_options
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.tables import Table, table_targets, tables_filled
from vlm_cli.checkpoint.published.targets import Target, TargetsOf, make_targets_of
from vlm_cli.checkpoint.published.towers.eva import EVA_OPTIONAL, make_eva_rules, read_eva_tower
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.modeling.config import VLMConfig

__all__ = ["HuggingFaceBLIP2", "LavisBLIP2"]

_TOWER = "vision_model."
_ADDED = r"added_tokens\.(?:embedding|head)\.\w+"
#: Part of the configuration -> what becomes of its settings. Shapes tell most sizes.
_SETTINGS = {
    "": Settings(
        config=Blip2Config,
        read={"vision_config", "qformer_config", "text_config", "num_query_tokens", "image_token_index"},
        without_effect={
            *("image_text_hidden_size", "initializer_factor", "initializer_range", "tie_word_embeddings"),
            "image_token_id",
        },
        fixed={"use_decoder_only_language_model": (True,)},
    ),
    "vision_config": Settings(
        config=Blip2VisionConfig,
        read={
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        },
        without_effect={"attention_dropout", "initializer_range"},
        fixed={"hidden_act": ("gelu",), "qkv_bias": (True,), "layer_norm_eps": (1e-6, 1e-5)},
    ),
    "qformer_config": Settings(
        config=Blip2QFormerConfig,
        read={
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "encoder_hidden_size"),
            "cross_attention_frequency",
        },
        without_effect={
            *("vocab_size", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob"),
            *("initializer_range", "pad_token_id", "position_embedding_type", "classifier_dropout"),
        },
        fixed={"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,), "use_qformer_text_input": (False,)},
    ),
}
_EPSILON = "The checkpoint has layer_norm_eps=1e-05 in vision_config, and timm's tower 1e-06: features differ."
_ORDER = (
    "BLIP-2 reads the image before the token that begins a text (</s>). vlm writes that token first, so answers may "
    "differ from those of BLIP-2's own code."
)


class HuggingFaceBLIP2:
    """`vision_model`, `qformer`, `language_projection` and `language_model`, with a `config.json` of type `blip-2`."""

    name = "BLIP-2 (Hugging Face)"
    source = "transformers/models/blip_2/modeling_blip_2.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the queries and the projection, and the configuration's type."""
        wanted = {"query_tokens", "language_projection.weight"}
        return checkpoint.config.get("model_type") == "blip-2" and wanted <= checkpoint.tensors.keys()

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from shapes and `config.json`: the checkpoint holds all parts."""
        config = checkpoint.config
        for part, settings in _SETTINGS.items():
            check_settings_of(checkpoint.name, part, config.get(part, {}) if part else config, settings)
        vision, vision_config = read_eva_tower(
            checkpoint, _TOWER, config.get("vision_config", {}).get("num_attention_heads", 16), checkpoint.folder
        )
        text = {"model_type": "opt", **config.get("text_config", {})}
        # Older files have no token for an image: its features stand before the text.
        media_id = config.get("image_token_index")
        return CheckpointDescription(
            composition={
                **_make_composition(checkpoint, config.get("qformer_config", {}).get("num_attention_heads", 12)),
                "vision_encoder": {**vision, "class_token": True, "norm": True},
                "language_model": {"name": checkpoint.name},
            },
            targets_for=lambda ours: _make_targets(checkpoint, ours),
            text_config=text,
            vision_config=vision_config,
            first_added_id=media_id,
            optional_pattern=EVA_OPTIONAL if media_id is not None else f"{EVA_OPTIONAL}|{_ADDED}",
            notes=(_ORDER, *([_EPSILON] if config.get("vision_config", {}).get("layer_norm_eps") == 1e-5 else [])),
        )


class LavisBLIP2:
    """`Qformer.bert`, `ln_vision` and `opt_proj`, and, where they were trained, `visual_encoder` and `opt_model`."""

    name = "BLIP-2 (LAVIS)"
    source = "https://github.com/salesforce/LAVIS/blob/main/lavis/models/blip2_models/blip2_opt.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the queries and LAVIS's projection."""
        return {"query_tokens", "opt_proj.weight"} <= checkpoint.tensors.keys()

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from shapes; the backbones may be absent, and are then those of the published models."""
        renamed = replace(checkpoint, tensors={_to_huggingface(name): x for name, x in checkpoint.tensors.items()})
        # BERT, whose network the Q-Former is, has heads of 64 channels at every size.
        composition = _make_composition(renamed, renamed.shape("query_tokens")[2] // 64)
        notes = [_ORDER]
        vision_config, vision = None, {"name": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k", "depth": 39}
        if f"{_TOWER}embeddings.patch_embedding.weight" in renamed.tensors:
            vision, vision_config = read_eva_tower(renamed, _TOWER)
        else:
            notes.append(
                "The checkpoint does not hold the vision encoder that it was trained with (LAVIS's eva_vit_g). vlm "
                "takes OpenCLIP's EVA01-g-14, which is the same network; nobody has verified that its weights are the "
                "same. For other weights: --set vision_encoder.pretrained=FILE. If you name another encoder, set "
                "depth, class_token and norm too."
            )
        composition["vision_encoder"] = {**vision, "class_token": True, "norm": True}
        width = renamed.shape("language_projection.weight")[0]
        if (known := _LANGUAGE_MODELS.get(width)) is not None:
            composition["language_model"] = {"name": known}
        notes.append(
            "The checkpoint does not name its language model. "
            + (f"By its width of {width} channels it is {known}. " if known else "")
            + "BLIP-2 ends its answers at a line break."
        )

        def targets_for(ours: VLMConfig) -> TargetsOf:
            targets_of = _make_targets(renamed, ours)
            return lambda name: targets_of(_to_huggingface(name))

        return CheckpointDescription(
            composition=composition,
            targets_for=targets_for,
            holds_language_model="language_model.model.decoder.embed_tokens.weight" in renamed.tensors,
            vision_config=vision_config,
            optional_pattern=f"{EVA_OPTIONAL}|{_ADDED}",
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


def _to_huggingface(name: str) -> str:
    """Turn LAVIS's name of a tensor into Transformers'.

    >>> _to_huggingface("Qformer.bert.encoder.layer.0.crossattention.self.key.bias")
    'qformer.encoder.layer.0.crossattention.attention.key.bias'
    """
    for pattern, replacement in _RENAMES:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return name


def _make_composition(checkpoint: PublishedCheckpoint, num_heads: int) -> dict[str, Any]:
    """Make the part of the composition that is the same in both layouts: the Q-Former, read from shapes."""
    return {
        "family": "blip",
        "vision_tokenizer": read_qformer_options(checkpoint, "", num_heads),
        "fusion": "language-stream",
        "added_tokens": [MEDIA_TOKEN],
        "trainable": ["vision_tokenizer", "added_tokens"],
    }


def _make_targets(checkpoint: PublishedCheckpoint, ours: VLMConfig) -> TargetsOf:
    """Make the lookup of targets, by Transformers' names, for a VLM of this configuration."""
    patches = checkpoint.tensors.get(f"{_TOWER}embeddings.patch_embedding.weight")
    embedding, head = r"language_model\.(.*embed_tokens)\.weight", r"language_model\.(lm_head)\.weight"
    filled = tables_filled(checkpoint, ours, embedding=embedding, head=head)
    added = slice(ours.first_added_id, ours.first_added_id + len(ours.added_tokens))

    def fill_table(match: re.Match[str], kind: Table) -> list[Target]:
        """Fill the language model's table; newer files have a row for the media token in it."""
        has_row = checkpoint.shape(f"language_model.{match[1]}.weight")[0] >= added.stop
        return table_targets(f"lang_model.{match[1]}.weight", filled[kind] if has_row else (), added=added)

    return make_targets_of(
        [
            *make_eva_rules(re.escape(_TOWER), 0 if patches is None else patches.shape[0]),
            (r"query_tokens", "vision_tokenizer.query_tokens"),
            # The branch that reads text serves retrieval, and the stage of training without a language model.
            (r"qformer\.(?:embeddings|cls)\..*", None),
            (r"qformer\.encoder\.layer\.\d+\.(?:intermediate|output)\..*", None),
            (r"qformer\.(.*)", r"vision_tokenizer.qformer.\1"),
            (r"language_projection\.(\w+)", r"vision_tokenizer.proj.\1"),
            (embedding, lambda match: fill_table(match, "embedding")),
            (head, lambda match: fill_table(match, "head")),
            (r"language_model\.(.*)", r"lang_model.\1"),
        ]
    )
