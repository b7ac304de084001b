"""What Transformers' models of a vision tower, a projector and a language model have in common: names and settings.

The tower becomes a vision encoder of the type `hf`, whose tensors keep their published names. A name begins with
`model.`, or with the part itself in files of releases before 4.52.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vlm_cli.checkpoint.parts.openclip import complete_preprocessing
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.preprocessing import read_image_settings, read_preprocessing
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.tables import table_targets, tables_filled
from vlm_cli.checkpoint.published.targets import Rule
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.language_model import embedding_scale, find_tables
from vlm_cli.modeling.meta import SkipsFilling, meta_device
from vlm_cli.trust import make_config, make_language_model

__all__ = ["MODEL", "NO_SETTINGS", "OPTIONAL_IN_TOWERS", "HFParts", "make_language_model_rules", "read_parts"]

#: What stands before the name of a part.
MODEL = r"(?:model\.)?"

_HEAD = r"(?:language_model\.)?lm_head\.weight"
#: Settings that say where a configuration comes from, and nothing of the model.
NO_SETTINGS = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
#: Norms and heads of towers that a VLM which reads patches does not need.
OPTIONAL_IN_TOWERS = r"vision_encoder\.visual\.(?:post_layernorm|head|layernorm|pooler)\..*"


@dataclass(frozen=True)
class HFParts:
    """The parts of a checkpoint, as plain data.

    Attributes:
        config: the checkpoint's configuration, with Transformers' defaults.
        vision_config: of the vision encoder.
        text_config: of the language model.
        images: settings of its image processor.
        rules: for the tensors of the tower.
        optional: pattern of names that the vision encoder has and does not need.
    """

    config: PreTrainedConfig
    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    images: Mapping[str, Any]
    rules: list[Rule]
    optional: str = OPTIONAL_IN_TOWERS


def read_parts(
    checkpoint: PublishedCheckpoint,
    settings: Settings,
    *,
    cuts: Collection[str],
    like: Mapping[str, Any],
    image_size: int | None = None,
) -> HFParts:
    """Read the configuration of a checkpoint and of its image processor.

    Args:
        checkpoint: with a `config.json`.
        settings: what becomes of the settings in it.
        cuts: settings of the image processor that say how pictures are cut; the layout reads them.
        like: how images are prepared where no file says it, in OpenCLIP's words.
        image_size: pixels of a tile; None for the vision encoder's.

    Raises:
        CheckpointError: for a setting that vlm cannot carry over.
    """
    data = dict(checkpoint.config)
    check_settings_of(checkpoint.name, "", data, settings)
    config: Any = make_config(data.pop("model_type"), **data)
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    if "lm_head.weight" not in checkpoint.tensors and "language_model.lm_head.weight" not in checkpoint.tensors:
        text["tie_word_embeddings"] = True
    size = _side(checkpoint.name, vision["image_size"] if image_size is None else image_size)
    pixels = read_preprocessing(checkpoint.folder, size, resize_mode="squash", like=like, also_read=cuts)
    # Every view is resized to both sides; a picture that keeps its shape does so on its canvas.
    squashed = {key: x for key, x in pixels.items() if key not in ("crop", "shortest_edge")} | {"resize_mode": "squash"}
    return HFParts(
        config=config,
        vision_config={
            "type": "hf",
            "config": {key: x for key, x in vision.items() if key not in NO_SETTINGS},
            "vision_cfg": {"image_size": size},
            "preprocess": complete_preprocessing(squashed),
        },
        text_config={key: x for key, x in text.items() if key not in NO_SETTINGS},
        images=read_image_settings(checkpoint.folder),
        rules=[(rf"{MODEL}vision_tower\.(?:vision_model\.)?(.*)", r"vision_encoder.visual.\1")],
    )


def _side(name: str, size: Any) -> int:
    """Return the pixels of a square's side.

    Raises:
        CheckpointError: if it is no square.
    """
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise CheckpointError(f"{name!r} has a vision encoder of {size} pixels; vlm cuts pictures into squares.")
    return int(sides.pop())


def make_language_model_rules(
    checkpoint: PublishedCheckpoint,
    config: VLMConfig,
    *,
    under: str = "language_model",
    has_added_rows: bool = True,
) -> list[Rule]:
    """Make the rules for a language model under a name.

    Args:
        checkpoint: names and shapes.
        config: of the VLM.
        under: the name.
        has_added_rows: whether its tables have a row for each added token.
    """
    with meta_device(), SkipsFilling():
        lm = make_language_model(config.text_config)
    own = f"{lm.base_model_prefix}."
    embedding_name, head_name = find_tables(lm)
    inner = re.escape(embedding_name.removeprefix(own))
    prefix = rf"{MODEL}{under}\.(?:model\.)?"
    embedding, rest = rf"{prefix}{inner}", (rf"{prefix}(.*)", rf"lang_model.{own}\1")
    to_embedding, to_head = f"lang_model.{embedding_name}", f"lang_model.{head_name}"
    if not has_added_rows:
        return [(_HEAD, to_head), (embedding, to_embedding), rest]
    added = slice(config.first_added_id, config.first_added_id + len(config.added_tokens))
    filled = tables_filled(checkpoint, config, embedding=embedding, head=_HEAD)
    scale = embedding_scale(lm.get_input_embeddings())
    return [
        (_HEAD, lambda _: table_targets(to_head, filled["head"], added=added, scale=scale)),
        (embedding, lambda _: table_targets(to_embedding, filled["embedding"], added=added, scale=scale)),
        rest,
    ]
