"""Compositions as text: YAML and JSON files, `name=value` overrides, and how later layers cover earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_cli.errors import CompositionError
from vlm_cli.lookalike import find_named
from vlm_cli.plain_data import COMPOSITION_BYTES, parse_json, parse_yaml, read_text
from vlm_cli.schema import show

__all__ = ["keep_trained_settings", "merge", "parse_override", "parse_overrides", "read_file", "split_name"]


def split_name(text: str) -> dict[str, str | None]:
    """Split `name[:tag]` into settings of a vision encoder. `hf:…`, `timm:…`, `hf-hub:…`, `local-dir:…` and
    paths have no tag.

    >>> split_name("ViT-L-14:openai")
    {'name': 'ViT-L-14', 'pretrained': 'openai'}
    >>> split_name("hf-hub:timm/ViT-B-16-SigLIP")
    {'name': 'hf-hub:timm/ViT-B-16-SigLIP', 'pretrained': None}
    """
    if text.startswith(("hf:", "timm:", "hf-hub:", "local-dir:")) or text.endswith(".json"):
        return {"name": text, "pretrained": None}
    name, _, tag = text.partition(":")
    return {"name": name, "pretrained": tag or None}


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Cover `base` with `layer`, part by part. A part of another type drops the settings of the old part.

    >>> merge({"fusion": {"type": "cross-attention", "every": 4}}, {"fusion": {"every": 2}})
    {'fusion': {'type': 'cross-attention', 'every': 2}}
    >>> merge({"fusion": {"type": "cross-attention", "every": 4}}, {"fusion": "language-stream"})
    {'fusion': {'type': 'language-stream'}}
    >>> merge({"tiling": {"type": "grid"}}, {"tiling": {"max_tiles": 4}})
    {'tiling': {'type': 'grid', 'max_tiles': 4}}
    """
    short = dict.fromkeys(("vision_tokenizer", "fusion", "tiling"), "type")
    short |= dict.fromkeys(("vision_encoder", "language_model"), "name")
    result = dict(base)
    for key, value in layer.items():
        if key not in short:
            result[key] = value
            continue
        value = {short[key]: value} if isinstance(value, str) else value
        old = result.get(key) or {}
        old = {short[key]: old} if isinstance(old, str) else old
        if not isinstance(value, Mapping) or not isinstance(old, Mapping):
            result[key] = value
            continue
        identity = value.get(short[key])
        replaces = identity is not None and identity != old.get(short[key])
        result[key] = dict(value) if replaces else {**old, **value}
    return result


def keep_trained_settings(described: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a layer, which will cover a checkpoint's composition, what the checkpoint's training fixed.

    A vision encoder with another name keeps how its features are taken. A language model with another name keeps
    whether its head has a bias.

    >>> described = {"vision_encoder": {"name": "ViT-L-14", "pretrained": "openai", "layer": -2}}
    >>> keep_trained_settings(described, {"vision_encoder": {"name": "ViT-B-32"}})
    {'vision_encoder': {'layer': -2, 'name': 'ViT-B-32'}}

    Args:
        described: the checkpoint's composition.
        layer: settings over it.
    """
    encoder = {k: x for k, x in described.get("vision_encoder", {}).items() if k not in ("name", "pretrained")}
    lm = {k: x for k, x in described.get("language_model", {}).items() if k == "head_bias"}
    result = dict(layer)
    for part, kept in (("vision_encoder", encoder), ("language_model", lm)):
        settings = {"name": layer[part]} if isinstance(layer.get(part), str) else layer.get(part)
        if isinstance(settings, Mapping) and settings.get("name") is not None:
            result[part] = {**kept, **settings}
    return result


def parse_override(text: str) -> dict[str, Any]:
    """Turn `part.setting=value` into nested data. The value is YAML.

    >>> parse_override("vision_tokenizer.num_latents=32")
    {'vision_tokenizer': {'num_latents': 32}}

    Raises:
        CompositionError: if the text has no `=` or no name, or the value is no YAML.
    """
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys) or len(keys) > 2:
        raise CompositionError(
            f"--set expects NAME=VALUE or PART.SETTING=VALUE, got {text!r}. "
            "Example: --set vision_tokenizer.num_latents=32"
        )
    try:
        result = parse_yaml(value)
    except ValueError as error:
        raise CompositionError(f"the value of --set {text!r} is not YAML: {error}.") from None
    for key in reversed(keys):
        result = {key: result}
    return result


def parse_overrides(overrides: Sequence[str], problems: list[str]) -> list[dict[str, Any]]:
    """Parse every override that can be parsed, and add a line to `problems` for each of the others."""
    parsed = []
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except CompositionError as error:
            problems += error.problems
    return parsed


def read_file(path: Path) -> dict[str, Any]:
    """Read a composition file, YAML or JSON, as plain data. Relative paths in it start at the file's folder.

    Raises:
        CompositionError: if the file cannot be read, or does not hold a mapping.
    """
    path = find_named(path)
    try:
        text = read_text(path, most_bytes=COMPOSITION_BYTES)
        data = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise CompositionError(f"cannot read composition file {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise CompositionError(f"composition file {str(path)!r} is not valid: {error}.") from None
    if not isinstance(data, dict):
        raise CompositionError(
            f"composition file {str(path)!r} must hold a mapping of parts to settings, but holds {show(data)}."
        )
    for part in ("vision_encoder", "language_model"):
        if part in data:
            data[part] = _rooted(data[part], path.parent)
    return data


def _rooted(value: Any, folder: Path) -> Any:
    """Put `folder` before each relative path of a part's settings, if that gives a path that exists."""
    if isinstance(value, Mapping):
        files = ("name", "tokenizer", "pretrained")
        return {key: _rooted(x, folder) if key in files else x for key, x in value.items()}
    if not isinstance(value, str) or not value:
        return value
    scheme, _, rest = value.rpartition("local-dir:")
    return f"{'local-dir:' if scheme or value != rest else ''}{folder / rest}" if (folder / rest).exists() else value
