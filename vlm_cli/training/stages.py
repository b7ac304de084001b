"""Read a file of stages: which data, parts, rates and length each stage of a training has.

    settings: {bf16: true}                 # of every stage
    stages:
      - name: align
        data: captions.json
        trainable: [vision_tokenizer]
        learning_rate: 1e-3
      - name: instruct
        data: instructions.json
        trainable: [vision_tokenizer, language_model]
        learning_rate: {vision_tokenizer: 1e-3, language_model: 2e-5}

The keys of a stage are the settings of `TrainingSettings` and some of `Job`. Plain data: nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_cli.composition.adapters import parse_adapter, parse_adapters
from vlm_cli.data.formats.columns import ColumnMap
from vlm_cli.data.mixture import place_data
from vlm_cli.errors import UsageError
from vlm_cli.flags import list_settings
from vlm_cli.lookalike import find_named
from vlm_cli.plain_data import COMPOSITION_BYTES, parse_yaml, read_text
from vlm_cli.registry import suggest
from vlm_cli.schema import Kind, check, list_of, mapping, text
from vlm_cli.training.setting_kinds import kind_of, plain_settings
from vlm_cli.training.settings import TrainingSettings

__all__ = ["Stage", "read_stages"]

_MOST_STAGES = 20

#: What a stage says of its records, as attributes of `Job` and of `Reading`.
_SOURCES, _READING = ("data", "eval_data"), ("image_folder", "media_root", "columns")
_FILES = (*_SOURCES, *_READING)


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        name: of the stage, which names its folder.
        sources: `data`, and perhaps `eval_data`.
        reading: what it says of rows and pictures, as attributes of `Reading`.
        settings: how the model learns in this stage.
    """

    name: str
    sources: Mapping[str, Path]
    reading: Mapping[str, Any]
    settings: TrainingSettings


def read_stages(path: Path, given: Mapping[str, Any] | None = None) -> list[Stage]:
    """Read a file of stages. A stage that names no `trainable` trains the parts of the stage before it.

    Args:
        path: the file, YAML. Relative paths in it start at its folder.
        given: settings that the user gave beside the file, which hold for every stage.

    Raises:
        UsageError: if the file cannot be read, or does not hold stages.
    """
    path = find_named(path)
    try:
        data = parse_yaml(read_text(path, most_bytes=COMPOSITION_BYTES))
    except OSError as error:
        raise UsageError(f"cannot read the stages {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"the stages {str(path)!r} are not valid: {error}.") from None
    file = f"the file of stages {str(path)!r}"
    _check(data, file)
    shared = {**(data.get("settings") or {})}
    stages: list[Stage] = []
    for stage in data["stages"]:
        before = {} if not stages else {"trainable": stages[-1].settings.trainable}
        stages.append(_go_on(stages, _make_stage(stage, {**before, **shared}, given or {}, path.parent, file), file))
    names = [stage.name for stage in stages]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{file} has two stages of the name {repeated[0]!r}. Give each a name of its own.")
    return stages


def _go_on(earlier: Sequence[Stage], stage: Stage, file: str) -> Stage:
    """Leave out of a stage the adapters that an earlier one begins: it goes on training them.

    Raises:
        UsageError: if it describes one in other words, or trains a part whole that has one.
    """
    begun = {text: before.name for before in earlier for text in before.settings.lora or ()}
    own = tuple(text for text in stage.settings.lora or () if text not in begun)
    parts = {parse_adapter(text)[0]: name for text, name in begun.items()}
    for part in [*parse_adapters(own), *(stage.settings.trainable or ())]:
        if part in parts:
            raise UsageError(
                f"stage {stage.name!r} of {file} names {part}, which has an adapter since stage {parts[part]!r}. Leave "
                "it out of lora and trainable: the stage goes on training the adapter."
            )
    return replace(stage, settings=replace(stage.settings, lora=own or None))


def _make_stage(
    data: Mapping[str, Any], shared: Mapping[str, Any], given: Mapping[str, Any], folder: Path, file: str
) -> Stage:
    values = {key: x for key, x in data.items() if key not in ("name", *_FILES)}
    plain = {**plain_settings(shared), **plain_settings(values)}
    template = plain.get("chat_template")
    if template is not None and (folder / template).is_file():
        plain["chat_template"] = str(folder / template)
    try:
        settings = TrainingSettings(**{**plain, **given})
    except UsageError as error:
        raise UsageError(f"stage {data['name']!r} of {file}: {error}") from None
    files = {key: x for key, x in data.items() if key in _FILES and x is not None}
    columns = {"columns": ColumnMap.parse(files.pop("columns"))} if "columns" in files else {}
    found = {key: folder / x if key in _READING else Path(place_data(x, folder)) for key, x in files.items()}
    sources = {key: x for key, x in found.items() if key in _SOURCES}
    return Stage(data["name"], sources, {**{k: x for k, x in found.items() if k in _READING}, **columns}, settings)


def _check(data: Any, file: str) -> None:
    """Check what a file of stages holds.

    Raises:
        UsageError: naming the keys.
    """
    settings = {setting.name: kind_of(setting) for setting in list_settings(TrainingSettings)}
    stage = mapping({"name": _NAME, "data": text()}, {**dict.fromkeys(_FILES[1:], text()), **settings})
    known = {"stages": list_of(stage, least=1, most=_MOST_STAGES)}
    check(data, mapping(known, {"settings": mapping({}, settings)}), file, UsageError)
    _check_keys(data, ("settings", "stages"), file)
    _check_keys(data.get("settings") or {}, tuple(settings), f"settings of {file}")
    for x in data["stages"]:
        _check_keys(x, ("name", *_FILES, *settings), f"stage {x['name']!r} of {file}")


def _check_keys(data: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in data:
        if key not in known:
            raise UsageError(
                f"{place} has an unknown key {str(key)!r}.{suggest(str(key), known)} Known: {', '.join(known)}."
            )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 60 and all(x.isalnum() or x in "-_" for x in value)


_NAME = Kind("a name of letters, digits, - and _, of at most 60 characters", _is_name)
