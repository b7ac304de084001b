"""vlm's own names, and the names of the code base that vlm continues: open_flamingo, branch `reduce-scope-mllm`.

There, added rows sit inside the language model's tables, and cross-attention blocks inside its layers.

>>> [target.target for target in own_targets_of("lang_model.model.layers.1.gated_cross_attn_layer.attn_gate")]
['fusion.blocks.1.attn_gate']
>>> [target.target for target in own_targets_of("fusion.blocks.1.attn_gate")]
['fusion.blocks.1.attn_gate']
"""

from __future__ import annotations

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.targets import Rule, TargetsOf, make_targets_of
from vlm_cli.checkpoint.schemas.vlm_config import check_vlm_config
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["OWN_RULES", "OwnDirectory", "own_targets_of"]

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


class OwnDirectory:
    """A directory that vlm wrote, for a build that replaces a part of it."""

    name = "vlm"
    source = "vlm build"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look at the type of the model."""
        return checkpoint.config.get("model_type") == "vlm"

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read everything from `config.json`.

        Raises:
            CheckpointError: if the configuration is not valid, or other places hold a part of the weights.
        """
        data = dict(checkpoint.config)
        check_vlm_config(data, checkpoint.name)
        if data.get("backbones") or data.get("adapters"):
            raise CheckpointError(
                f"{checkpoint.name!r} is a delta directory: its frozen parts are in other places. Make it whole first: "
                f"vlm build WHOLE --from {checkpoint.name}"
            )
        config = VLMConfig.from_dict(dict(data))
        measured = ("num_patches", "dim", "grid")
        return CheckpointDescription(
            composition=config.composition.to_dict(),
            targets_for=lambda ours: own_targets_of,
            text_config=data["text_config"],
            vision_config={key: x for key, x in config.vision_config.items() if key not in measured},
            tokenizer=str(checkpoint.folder),
            first_added_id=config.first_added_id,
        )
