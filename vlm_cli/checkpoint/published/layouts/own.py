"""vlm's own names, and the names of the code base that vlm continues: open_flamingo, branch `reduce-scope-mllm`.

There, added rows sit inside the language model's tables, and cross-attention blocks inside its layers.

>>> [target.target for target in own_targets_of("lang_model.model.layers.1.gated_cross_attn_layer.attn_gate")]
['fusion.blocks.1.attn_gate']
>>> [target.target for target in own_targets_of("fusion.blocks.1.attn_gate")]
['fusion.blocks.1.attn_gate']
"""

from __future__ import annotations

from vlm_cli.checkpoint.published.targets import Rule, TargetsOf, make_targets_of

__all__ = ["OWN_RULES", "own_targets_of"]

#: Every name has a target: a name that no other rule knows is taken as vlm's own.
OWN_RULES: tuple[Rule, ...] = (
    (r"vision_encoder\.(?!visual\.)(.*)", r"vision_encoder.visual.\1"),
    (r"lang_model\..*\.additional_embedding\.(.*)", r"added_tokens.embedding.\1"),
    (r"lang_model\..*\.additional_fc\.(.*)", r"added_tokens.head.\1"),
    (r"lang_model\..*?\.(\d+)\.gated_cross_attn_layer\.(.*)", r"fusion.blocks.\1.\2"),
    (r"lang_model\.gated_cross_attn_layers\.(\d+)\.(.*)", r"fusion.blocks.\1.\2"),
    (r"(lang_model\..*?\.\d+)\.decoder_layer\.(.*)", r"\1.\2"),
    (r"(.*)", r"\1"),
)

own_targets_of: TargetsOf = make_targets_of(OWN_RULES)
