"""What a configuration may say of a model of timm: a name that timm has, and sizes.

Transformers hands `architecture` and `model_args` of a configuration to `timm.create_model` as they stand, and timm
would fetch or open what they name:

    "architecture": "hf-hub:org/name"                      a configuration and weights of the hub
    "model_args": {"checkpoint_path": "…/weights.pth"}     a file
    "model_args": {"pretrained_cfg": {"url": "…"}}         an address
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_cli.schema import either, list_of, mapping, number, optional, show, text, truth, whole

__all__ = ["TIMM_ARGUMENTS", "TIMM_SIZES", "find_timm_problems"]

_PIXELS = whole(1, 65_536)
_KINDS = {
    "img_size": either(_PIXELS, list_of(_PIXELS, least=2, most=2)),
    "patch_size": whole(1, 1_024),
    "embed_dim": whole(1, 1_000_000),
    "depth": whole(1, 1_000),
    "num_heads": whole(1, 1_024),
    "mlp_ratio": number(0, 1_000, above=True),
    "init_values": optional(number(0, 1_000)),
    "ref_feat_shape": optional(list_of(whole(1, 4_096), least=2, most=2)),
    "use_post_transformer_norm": truth(),
    "global_pool": text(most=40, empty=True),
    "inference_mode": truth(),
}
#: Arguments with which Transformers makes a model of timm give maps of several sizes.
_MAPS = {
    "features_only": truth(),
    "in_chans": whole(1, 1_024),
    "out_indices": list_of(whole(-64, 64), least=1, most=64),
}
#: Arguments of timm's models that a configuration may set, and what they must be.
TIMM_SIZES, TIMM_ARGUMENTS = tuple(_KINDS), mapping({}, _KINDS)


def find_timm_problems(settings: Any, key: str = "") -> Iterator[str]:
    """Find what a configuration, and those in it, says of a model of timm beside its name and sizes.

    Args:
        settings: a configuration as plain data.
        key: its dotted key, which the sentences name; empty for a whole file.
    """
    if isinstance(settings, list):
        for x in settings:
            yield from find_timm_problems(x, key)
    if not isinstance(settings, Mapping):
        return
    for name, value in settings.items():
        place = f"{key}.{str(name)[:60]}".lstrip(".")
        if name == "model_args" and isinstance(value, Mapping):
            if more := sorted(str(x)[:60] for x in value if x not in _KINDS):
                yield (
                    f"{place} would give timm's model {', '.join(more)}, and vlm gives it only sizes: "
                    f"{', '.join(TIMM_SIZES)}."
                )
            yield from mapping({}, {**_KINDS, **_MAPS}).find_problems(value, place)
        elif name == _name_key(settings) and isinstance(value, str) and any(x in value for x in ":/\\"):
            yield f"{place} may only be a name that timm itself has, but is {show(value)}."
        else:
            yield from find_timm_problems(value, place)


def _name_key(settings: Mapping[str, Any]) -> str:
    """Return the setting that holds the name of timm's model."""
    return "backbone" if settings.get("model_type") == "timm_backbone" else "architecture"
