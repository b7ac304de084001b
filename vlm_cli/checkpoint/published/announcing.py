"""The texts that a published processor writes around and between the views of a picture.

A tokenizer names some of its special tokens (`boi_token`), and a processor names texts among its settings
(`tile_token`). Both are files of settings that a user may have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import read_json
from vlm_cli.schema import show

__all__ = ["read_named_tokens", "read_processor"]

_TOKENIZER, _PROCESSOR = "tokenizer_config.json", "processor_config.json"
#: Settings of every processor that do not decide what stands in a prompt.
_WITHOUT_EFFECT = {
    *("processor_class", "auto_map", "image_processor", "video_processor", "tokenizer", "feature_extractor"),
    *("chat_template", "_name_or_path"),
}


def read_named_tokens(folder: Path | None, defaults: Mapping[str, str]) -> dict[str, str]:
    """Read special tokens that a tokenizer has under a name.

    Args:
        folder: with `tokenizer_config.json`; without the file, the defaults count. None for no folder.
        defaults: name -> the published token.

    Raises:
        CheckpointError: if a named token is no text.
    """
    settings = _read(folder, _TOKENIZER)
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(named := settings.get(key), Mapping):
            settings = {**settings, **named}
    found: dict[str, str] = {}
    for name, default in defaults.items():
        token = settings.get(name, default)
        text = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(text, str):
            raise CheckpointError(f"{_TOKENIZER} has {name}={show(token)}, which is no token.")
        found[name] = text
    return found


def read_processor(
    folder: Path | None, defaults: Mapping[str, Any], without_effect: Collection[str] = ()
) -> dict[str, Any]:
    """Read the settings of a processor, which brings an image processor and a tokenizer together.

    Args:
        folder: with `processor_config.json`; without the file, the defaults count. None for no folder.
        defaults: setting -> Transformers' default.
        without_effect: more settings that do not decide what stands in a prompt.

    Raises:
        CheckpointError: for a setting that is not known, or of another type than its default.
    """
    found = dict(defaults)
    for key, value in _read(folder, _PROCESSOR).items():
        if key in defaults:
            if type(value) is not type(defaults[key]):
                raise CheckpointError(f"{_PROCESSOR} sets {key}={show(value)}; expected such as {show(defaults[key])}.")
            found[key] = value
        elif key not in _WITHOUT_EFFECT and key not in without_effect and value not in (None, False):
            raise CheckpointError(
                f"{_PROCESSOR} sets {key}={show(value)}, and vlm does not know what to do with it. Known: "
                f"{', '.join([*defaults, *without_effect]) or 'none'}."
            )
    return found


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (file := folder / name).is_file():
        return {}
    data: Any = read_json(file)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{name} holds {show(data)} instead of settings.")
    return dict(data)
