"""A wrong value in a file of a model is refused in words that name the file and the key."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.support import disk
from tests.support.grid import first_rows
from vlm_cli.checkpoint.directory import load, read_config, read_generation_config, read_processor
from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.parts.openclip import find_openclip_tower
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.schemas.vlm_config import check_vlm_config
from vlm_cli.composition import LanguageModelOptions, VisionEncoderOptions, read_file
from vlm_cli.composition.composition import Composition
from vlm_cli.errors import VLMError
from vlm_cli.models import DEMO, load_meta_model
from vlm_cli.training.checkpoints import COMPLETE_FILE, TrainingCheckpoint

#: Words of Python's own errors, which no user should have to read.
PYTHON = re.compile(
    r"NoneType|object has no|object is not|has no len|out of range|to unpack|subscriptable|unsupported operand|"
    r"Traceback|unexpected keyword|required positional|invalid literal|not callable|iterable|KeyError|TypeError|"
    r"AttributeError|AssertionError|unhashable|'(int|str|list|dict|float|bool)'|integer string conversion"
)
GONE = object()
VALUES = (GONE, None, [], ["x", None], {}, {"x": 1}, "text", "", 10**30, 2147483648, -1, 1.5, float("nan"), True)


def keys(data: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each key of nested mappings."""
    for key, value in data.items() if isinstance(data, dict) else ():
        yield (*above, key)
        yield from keys(value, (*above, key))


def mutated(data: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy in which a key has another value, or is gone."""
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


def wrong_messages(read: Callable[[Any], Any], data: Any, file: str, most: int | None = None) -> tuple[list[str], int]:
    """Change each key of a file, and read it; return the messages that are not as they must be, and how many there are.

    A value that does no harm may be read. With `most`, each key gets only so many of the values, in turns.
    """
    wrong, refused = [], 0
    values = itertools.cycle(VALUES)
    for path in keys(data):
        for value in itertools.islice(values, most or len(VALUES)):
            try:
                read(mutated(data, path, value))
            except VLMError as error:
                refused += 1
                message = str(error)
                names = file in message and any(key in message or key.replace("_", " ") in message for key in path)
                if not names or PYTHON.search(message) or len(message) > 3000:
                    wrong.append(f"{'.'.join(path)} = {value!r}: {message}")
            except Exception as error:
                wrong.append(f"{'.'.join(path)} = {value!r}: {type(error).__name__}: {error}")
    return wrong, refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def reader(folder: Path, file: str, read: Callable[[str], Any]) -> Callable[[Any], Any]:
    def run(data: Any) -> Any:
        (folder / file).write_text(json.dumps(data))
        return read(str(folder))

    return run


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("file", "read", "least"),
    [
        ("config.json", lambda name: load_meta_model(name)[0], 100),
        ("processor_config.json", read_processor, 15),
        ("generation_config.json", read_generation_config, 8),
    ],
)
@pytest.mark.parametrize("most", [1, pytest.param(None, marks=pytest.mark.attack)])
def test_each_key_of_a_directory(model: Path, file: str, read: Any, least: int, most: int | None) -> None:
    data = json.loads((model / file).read_text())
    wrong, refused = wrong_messages(reader(model, file, read), data, file, most)
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:40])
    assert refused >= (least if most is None else least // 4)


def test_the_untouched_directory_is_read(model: Path) -> None:
    assert load(str(model))[0] is not None


def test_each_key_of_an_openclip_file(tmp_path: Path) -> None:
    file = tmp_path / "tower.json"

    def read(data: Any) -> Any:
        file.write_text(json.dumps(data))
        return find_openclip_tower(VisionEncoderOptions(name=str(file)))

    wrong, refused = wrong_messages(read, disk.TOWER, "tower.json")
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:40])
    assert refused > 40


@pytest.mark.parametrize(("most", "least"), first_rows([(3, 10), (None, 40)]))
def test_each_key_of_a_language_model(tmp_path: Path, most: int | None, least: int) -> None:
    folder = disk.language_model(tmp_path / "lm")
    data = json.loads((folder / "config.json").read_text())
    read = reader(folder, "config.json", lambda name: find_language_model(LanguageModelOptions(name=name)))
    wrong, refused = wrong_messages(read, data, str(folder), most)
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:40])
    assert refused > least


@pytest.mark.parametrize(("most", "least"), first_rows([(3, 20), (None, 100)]))
def test_each_key_of_a_composition_file(tmp_path: Path, most: int | None, least: int) -> None:
    file = tmp_path / "composition.json"

    def read(data: Any) -> Any:
        file.write_text(json.dumps(data))
        return Composition.compose(None, read_file(file))

    data = json.loads((DEMO / "config.json").read_text())["composition"]
    wrong, refused = wrong_messages(read, data, "", most)
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:40])
    assert refused > least


def test_each_key_of_a_training_manifest(tmp_path: Path) -> None:
    data = {"step": 3, "seconds": 1.5, "images": 12, "run": {"seed": 0}}

    def read(data: Any) -> Any:
        (tmp_path / COMPLETE_FILE).write_text(json.dumps(data))
        return TrainingCheckpoint.read(tmp_path)

    assert read(data).step == 3
    wrong, refused = wrong_messages(read, data, COMPLETE_FILE)
    assert not wrong, "\n".join(wrong[:40])
    assert refused > 30


@pytest.mark.sample(2)
@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{", "[" * 100_000, "1" * 5000, "\xff"])
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "generation_config.json"])
def test_files_that_are_no_mapping(model: Path, file: str, text: str) -> None:
    (model / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(VLMError) as error:
        read_config(str(model))
        read_processor(str(model))
        read_generation_config(str(model))
    assert file in str(error.value)
    assert not PYTHON.search(str(error.value))


def test_a_message_of_python_is_caught() -> None:
    def read(data: Any) -> Any:
        raise VLMError("file.json: a: object of type 'NoneType' has no len()")

    assert wrong_messages(read, {"a": 1}, "file.json")[0]


def test_a_tokenizer_that_multiplies_its_input(model: Path) -> None:
    file = model / "tokenizer.json"
    data = json.loads(file.read_text())
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * 40}
    file.write_text(json.dumps(data))
    with pytest.raises(VLMError, match=r"tokenizer.json .* normalizer makes up to 1.1e\+12 characters of one"):
        read_processor(str(model))
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    file.write_text(json.dumps(data))
    read_processor(str(model))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 0, "content": "a", "x\x1b]0;y\x07": 1}]}, "keys are printable"),
        ("tokenizer_config.json", {"bos_token": {"content": "a", "x\x1b": 1}}, "keys are printable"),
        ("special_tokens_map.json", {"bos_token": {"content": "a", "x\x1b": 1}}, "keys are printable"),
        ("tokenizer.json", {"model": {"type": "BPE", "merges": [], "vocab": {"a": 0, "b": 2**31}}}, "ids below"),
        ("tokenizer.json", {"model": {"type": "BPE", "merges": [], "vocab": {"a": -1}}}, "ids below"),
        (
            "tokenizer.json",
            {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]], "continuing_subword_prefix": "##"}},
            "does not begin with '##'",
        ),
    ],
)
def test_what_the_tokenizers_library_would_print_or_reserve(model: Path, file: str, change: Any, words: str) -> None:
    path = model / file
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **change}))
    with pytest.raises(VLMError, match=rf"{file} .*{words}"):
        read_processor(str(model))


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("num_hidden_layers", 3 * 10**9, "10,000"),
        ("layers", float("inf"), "10,000"),
        ("hidden_size", 10**9, "10,000,000"),
    ],
)
def test_a_published_configuration_has_limits(tmp_path: Path, key: str, value: float, most: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    for config in ({key: value}, {"vision_config": {key: value}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(VLMError, match=f"{key} must be at most {most}, but is"):
            PublishedCheckpoint.open(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {key: 2}, "vision_feature_layer": -2}))
    assert PublishedCheckpoint.open(str(tmp_path)).config


def change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tokenizer_config.json", lambda data: data.pop("pad_token"), "names no pad_token"),
        (
            "tokenizer.json",
            lambda data: [
                token.update(special=True) for token in data["added_tokens"] if token["content"] == "<image>"
            ],
            "<image> must not be special",
        ),
        ("config.json", lambda data: data.update(media_token_id=3), "gives <image> the id .* and config.json says 3"),
        (
            "processor_config.json",
            lambda data: data["image_processor"]["preprocess"].update(size=48),
            r"makes images of 48 x 48 pixels, and config.json says \d+ x",
        ),
        (
            "processor_config.json",
            lambda data: data["image_processor"]["preprocess"].update(nothing=1),
            "describes no preprocessing that vlm has",
        ),
        (
            "config.json",
            lambda data: data.update(first_added_id=data["first_added_id"] - 1),
            "gives .* the id .*, and with the first_added_id of config.json it is",
        ),
    ],
)
def test_files_that_do_not_belong_together(model: Path, file: str, change: Any, words: str) -> None:
    change_json(model / file, change)
    with pytest.raises(VLMError, match=words):
        load(str(model))


def test_texts_of_a_tiling_are_tokens_and_no_media(model: Path) -> None:
    data = json.loads((model / "config.json").read_text())
    check_vlm_config(data | {"tiling_texts": {"<img>": [0, 1]}}, "a model")
    for ids in ([10**6], [data["media_token_id"]], [-1], "1", [None]):
        with pytest.raises(VLMError, match="tiling_texts"):
            check_vlm_config(data | {"tiling_texts": {"<img>": ids}}, "a model")


def test_the_generation_config_is_checked_when_a_model_is_loaded(model: Path) -> None:
    change_json(model / "generation_config.json", lambda data: data.update(eos_token_id=""))
    with pytest.raises(VLMError, match="eos_token_id must be"):
        load(str(model))


def test_sizes_that_the_weights_do_not_hold(model: Path) -> None:
    data = json.loads((model / "config.json").read_text())
    data["text_config"]["intermediate_size"] = 9_000_000
    (model / "config.json").write_text(json.dumps(data))
    with pytest.raises(VLMError, match=r"config\w* .*asks for more than .* numbers, and its weight files have"):
        load(str(model))
