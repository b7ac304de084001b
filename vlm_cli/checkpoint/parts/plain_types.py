"""Vision encoders of Transformers' larger models that are plain ones under another name, with their tensors.

Idefics3's vision encoder is a SigLIP that can also read padded images of other shapes. vlm gives it whole images, which
a plain SigLIP reads the same, so it builds a plain SigLIP and takes the tensors:

    idefics3_vision  embeddings.patch_embedding.weight   ->  siglip_vision_model  embeddings.patch_embedding.weight
    ovis2_vision     embeddings.patch_embedding.weight   ->  aimv2_vision_model   embeddings.patch_embed.weight
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor

__all__ = ["PLAIN_TYPES", "PlainType", "order_positions"]

_POSITIONS = "embeddings.position_embedding.weight"
_VIT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *("patch_size", "hidden_act", "attention_dropout"),
)


def order_positions(table: Tensor) -> Tensor:
    """Return the row that Idefics2, Idefics3 and SmolVLM add to each patch of a whole image.

    The published code finds a row by where a patch begins, as a fraction of the image, among the fractions where rows
    begin. On a few grids, such as 19 patches on a side, rounding gives two patches the same row.

    Args:
        table: float[v, d], of a square grid.
    """
    side = isqrt(len(table))
    starts = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    found = torch.bucketize(starts, torch.arange(1 / side, 1.0, 1 / side), right=True)
    return table[(found[:, None] * side + found).flatten().to(table.device)]


@dataclass(frozen=True, kw_only=True)
class PlainType:
    """What a type is under its plain name.

    Attributes:
        model_type: the plain type.
        settings: names of settings that both have.
        more: settings of the plain type that always have this value.
        renamed: a tensor's name -> its plain name, where they differ.
        changed: a tensor's plain name -> what makes the plain tensor of it.
    """

    model_type: str
    settings: tuple[str, ...]
    more: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def convert_settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plain configuration, with `model_type`."""
        return {"model_type": self.model_type, **self.more, **{key: own[key] for key in self.settings if key in own}}

    def convert_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors under their plain names; those on the meta device have no values to change."""
        plain = {self.renamed.get(name, name): x for name, x in tensors.items()}
        return {
            name: self.changed[name](x) if name in self.changed and not x.is_meta else x for name, x in plain.items()
        }


_NAVIT = PlainType(
    model_type="siglip_vision_model",
    settings=(*_VIT, "layer_norm_eps"),
    more={"vision_use_head": False},
    changed={_POSITIONS: order_positions},
)

#: Type of a larger model's vision encoder -> what it is under its plain name.
PLAIN_TYPES: dict[str, PlainType] = {
    **dict.fromkeys(("idefics2_vision", "idefics3_vision", "smolvlm_vision"), _NAVIT),
    # Its configuration says embed_dim for hidden_size, and Transformers knows both.
    "idefics_vision": PlainType(model_type="clip_vision_model", settings=(*_VIT, "layer_norm_eps")),
    "ovis2_vision": PlainType(
        model_type="aimv2_vision_model",
        settings=(*_VIT, "rms_norm_eps", "qkv_bias", "mlp_bias", "initializer_range"),
        more={"use_head": False},
        renamed={f"embeddings.patch_embedding.{x}": f"embeddings.patch_embed.{x}" for x in ("weight", "bias")},
    ),
    "pp_chart2table_vision": PlainType(
        model_type="got_ocr2_vision",
        settings=(
            *(*_VIT, "output_channels", "layer_norm_eps", "qkv_bias", "use_abs_pos", "use_rel_pos", "window_size"),
            *("global_attn_indexes", "mlp_dim"),
        ),
    ),
}
