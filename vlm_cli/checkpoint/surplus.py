"""Tensors of weight files that a model does not use: harmless ones, and those that show a wrong configuration.

A configuration that states fewer layers than its files hold builds a smaller model, which answers something else. So
files may hold more than the model only where the surplus is known:

    model.layers.0.self_attn.rotary_emb.inv_freq   computed from the configuration, and stored by older releases
    model.layers.61.mlp.up_proj.weight             a layer that predicts further tokens, which the configuration counts
    vision_tower.…, v_head.…                       another part, where a language model was taken out of a larger model
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["find_surplus", "is_computed"]

#: Endings of names that Transformers computes from the configuration, and that older releases stored.
_COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|position_ids|(attn|attention)\.(masked_)?bias|causal_mask"
    r"|embed_positions\.weights|(en|de)coder\.version)$"
)
#: Parts of a larger model, and heads for other tasks, beside the language model in them.
_OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision_\w+|image_\w+|multi_modal_projector|mm_\w+|audio_\w+|embed_vision|embed_audio|talker"
    r"|token2wav|code2wav|mtp\w*|v_head|score|classifier|pooler|cls\.seq_relationship)\."
)
#: Settings that count the layers, after the others, that predict further tokens. Transformers does not build them.
_PREDICTING_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def find_surplus(names: Iterable[str], config: Any, held: Iterable[str]) -> list[str]:
    """Return the names, of those that a language model did not use, that it should have had a place for.

    Args:
        names: what Transformers calls unexpected: names in the files that the model does not have.
        config: of the language model.
        held: names that the model has.
    """
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", 0)
    predicting = max((getattr(text, key, None) or 0 for key in _PREDICTING_LAYERS), default=0)
    surplus = sorted(
        name
        for name in names
        if not is_computed(name)
        and not _OTHER_PARTS.search(name)
        and not any(depth <= layer < depth + predicting for layer in _layers(name))
    )
    if getattr(config, "quantization_config", None) is None:
        return surplus
    # A quantizer stores scales and the like beside a weight. What is named as a weight of the model is one more layer.
    known = {_without_numbers(name) for name in held}
    return [name for name in surplus if _without_numbers(name) in known]


def is_computed(name: str) -> bool:
    """Tell whether a tensor holds what Transformers computes from the configuration.

    >>> is_computed("transformer.h.3.attn.bias"), is_computed("transformer.h.3.attn.c_attn.bias")
    (True, False)
    """
    return _COMPUTED.search(name) is not None


def _layers(name: str) -> list[int]:
    """Return the numbers in a name; the first is that of the layer."""
    return [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name)[:1]]


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
