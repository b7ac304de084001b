"""config.json of a VLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_cli.checkpoint.schemas.text_config import check_sizes, check_text_config
from vlm_cli.checkpoint.schemas.values import DTYPE, ID, IDS
from vlm_cli.checkpoint.schemas.vision import PREPROCESS, VISION_CFG, VISION_CONFIG, patches_problem
from vlm_cli.composition.adapters import ADAPTABLE_PARTS
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import (
    ANYTHING,
    Kind,
    check,
    choice,
    list_of,
    mapping,
    mapping_of,
    optional,
    show,
    text,
    whole,
)
from vlm_cli.timm_sizes import TIMM_ARGUMENTS

__all__ = ["check_vlm_config"]

_ONE_ENCODER = mapping({"name": text(empty=True)})
_SEVERAL_ENCODERS = list_of(_ONE_ENCODER, least=2, most=8)
_ENCODER_SETTINGS = Kind(
    "a mapping of keys to values, or a list of several",
    lambda x: isinstance(x, (Mapping, list)),
    lambda x, key: (_SEVERAL_ENCODERS if isinstance(x, list) else _ONE_ENCODER).find_problems(x, key),
)
_VLM_CONFIG = mapping(
    {
        "composition": mapping(
            {
                "vision_encoder": _ENCODER_SETTINGS,
                "vision_tokenizer": mapping({"type": text(most=200)}),
                "fusion": mapping({"type": text(most=200)}),
                "language_model": mapping({"name": text(empty=True)}),
            }
        ),
        "text_config": mapping({"model_type": text(most=100)}),
        "vision_config": VISION_CONFIG,
        "added_tokens": list_of(text(most=1_000)),
        "first_added_id": ID,
        "media_token_id": ID,
    },
    {
        "pad_token_id": optional(ID),
        "eos_token_id": optional(IDS),
        "dtype": optional(DTYPE),
        "backbones": optional(mapping_of(ANYTHING)),
        "adapters": optional(list_of(choice(*ADAPTABLE_PARTS))),
        "tiling_texts": optional(mapping_of(list_of(ID))),
        "random_weights": optional(Kind("true or false", lambda x: isinstance(x, bool))),
    },
)


def check_vlm_config(data: Mapping[str, Any], name: str) -> None:
    """Check config.json of a VLM. The composition in it is checked where it is read.

    Raises:
        CheckpointError: naming the key.
    """
    where = f"config.json of {name!r}"
    check(data, _VLM_CONFIG, where)
    check_text_config(data["text_config"], where, "text_config", CheckpointError)
    _check_type_is_known(data["text_config"], where)
    first, number_added = data["first_added_id"], len(data["added_tokens"])
    # A tokenizer that knows `<image>` already keeps its id, which then stands before the added ones.
    if not 0 <= data["media_token_id"] < first + number_added:
        raise CheckpointError(
            f"{where} is not valid: media_token_id must be below {first + number_added} (first_added_id and the number "
            f"of added tokens), but is {data['media_token_id']}."
        )
    for words, ids in (data.get("tiling_texts") or {}).items():
        # A media token in a text would take the place of a vision token.
        if any(i >= first + number_added or i == data["media_token_id"] for i in ids):
            raise CheckpointError(
                f"{where} is not valid: tiling_texts must hold ids below {first + number_added}, without that of "
                f"<image>, but those of {show(words)} are {show(ids)}."
            )
    _check_encoder(data["vision_config"], where)


def _check_encoder(vision: Mapping[str, Any], where: str) -> None:
    """Check what a vision encoder of its type needs.

    Raises:
        CheckpointError: naming the key.
    """
    if vision.get("type") == "several":
        one = mapping({"vision_cfg": VISION_CFG, "preprocess": PREPROCESS})
        check(vision, mapping({"encoders": list_of(one, least=2, most=8)}), f"vision_config in {where}")
        for encoder in vision["encoders"]:
            if encoder.get("type") == "several":
                raise CheckpointError(f"{where} is not valid: vision_config.encoders may hold no list of encoders.")
            _check_encoder(encoder, where)
        return
    if "type" not in vision:
        check(vision, mapping({"embed_dim": whole(1, 1_000_000)}), f"vision_config in {where}")
        if problem := patches_problem(vision["vision_cfg"]):
            raise CheckpointError(f"{where} is not valid: {problem}")
    if vision.get("type") == "timm":
        check(vision, mapping({"name": text(most=100)}, {"args": TIMM_ARGUMENTS}), f"vision_config in {where}")
    if vision.get("type") == "hf":
        check(vision, mapping({"config": mapping({"model_type": text(most=100)})}), f"vision_config in {where}")
        check_text_config(vision["config"], where, "vision_config.config", CheckpointError)
        check_sizes(vision["config"], where)


def _check_type_is_known(text_config: Mapping[str, Any], where: str) -> None:
    """Check that Transformers has the type of a language model, or that the language model brings its own code.

    Raises:
        CheckpointError: if neither holds.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = text_config["model_type"]
    if model_type not in CONFIG_MAPPING and not text_config.get("auto_map"):
        raise CheckpointError(
            f"{where} is not valid: text_config.model_type is {show(model_type)}, a type of language model that this "
            "version of Transformers does not have. A newer version may: pip install -U transformers"
        )
