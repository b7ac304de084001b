"""A number that a user or a composition gives may not hang, fill the memory or show a traceback: words refuse it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from vlm_cli.cli.app import app
from vlm_cli.composition import FAMILIES, Composition
from vlm_cli.composition.request import CompositionRequest
from vlm_cli.errors import CompositionError, UsageError
from vlm_cli.flags import Flag, list_settings
from vlm_cli.plain_data import parse_json, parse_yaml
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS
from vlm_cli.training.settings import TrainingSettings

#: Texts for options. None of them is a number that an option may have.
HOSTILE = ("99999999999999999999", "-99999999999999999999", "1" * 5000, "nan", "inf")
#: Values for settings that are numbers.
NUMBERS = (10**30, 2**63, -(10**30), 10**5000, float("nan"), float("inf"), float("-inf"), 1e308, -1e308)


def numeric_options() -> Iterator[tuple[str, str]]:
    """All options of all commands whose value is a number; --batch-size of `vlm batch` may also be auto."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.type_descriptor.annotation in (int, float) or (name, parameter.name) == (
                "batch",
                "batch_size",
            ):
                yield name, max(parameter.opts, key=len)


def test_the_walk_finds_the_options() -> None:
    found = set(numeric_options())
    assert {("generate", "--num-beams"), ("batch", "--batch-size"), ("train", "--max-grad-norm")} <= found
    assert len(found) > 35


@pytest.mark.parametrize(("command", "option"), numeric_options())
def test_an_impossible_number_is_wrong_usage(command: str, option: str) -> None:
    started = time.monotonic()
    for value in HOSTILE:
        others = ["-", "--output", "answers.jsonl"] if command == "batch" else []
        result = CliRunner().invoke(app, [command, *others, f"{option}={value}"])
        assert result.exit_code == 2, (value, result.output)
        assert "Traceback" not in result.output
        assert option in result.output
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("setting", list_settings(TrainingSettings), ids=lambda setting: setting.name)
def test_settings_of_training_have_limits(setting: Any) -> None:
    if setting.type not in (int, float):
        return
    assert setting.flag.most is not None, "a number needs a largest value"
    for value in NUMBERS:
        with pytest.raises(UsageError, match=setting.spelling):
            TrainingSettings(**{setting.name: value})
    assert Flag(help="", heading="").most is None  # the check above can fail


def numeric_settings() -> Iterator[tuple[str, str]]:
    """Part and name of every setting of a composition that is a number."""
    for family in ("flamingo", "llava", "blip", "idefics"):
        if family not in FAMILIES:
            continue
        composition = FAMILIES[family]
        choices = {
            "vision_tokenizer": VISION_TOKENIZERS[composition["vision_tokenizer"]["type"]].options_class(),
            "fusion": FUSIONS[composition["fusion"]["type"]].options_class(),
        }
        for part, options in choices.items():
            hints = get_type_hints(options)
            for field in dataclasses.fields(options):
                if {int, float} & {hints[field.name], *get_args(hints[field.name])}:
                    yield family, f"{part}.{field.name}"
    for name in ("vision_encoder.layer", "vision_encoder.image_size", "vision_encoder.depth", "weight_decay"):
        yield "flamingo", name


@pytest.mark.parametrize(("family", "name"), sorted(set(numeric_settings())))
def test_settings_of_compositions_have_limits(family: str, name: str) -> None:
    part, _, key = name.rpartition(".")
    for value in NUMBERS:
        layer = {part: {key: value}} if part else {key: value}
        base = {"vision_encoder": {"name": "ViT-B-32"}, "language_model": {"name": "./lm"}}
        for family_part in base.keys() & layer.keys():
            layer[family_part] = {**base[family_part], **layer[family_part]}
        with pytest.raises(CompositionError, match=key) as error:
            Composition.compose(family, {**base, **layer})
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"added_tokens": ["<image>", ""]}, "added_tokens holds an empty name"),
        ({"added_tokens": ["<image>", *map(str, range(5000))]}, "added_tokens holds 5,001 names"),
        ({"weight_decay": -1}, "weight_decay must be a number from 0"),
        ({"x" * 100_000: 1}, "unknown key"),
    ],
)
def test_compositions_that_mean_nothing(layer: dict[str, Any], words: str) -> None:
    with pytest.raises(CompositionError, match=words) as error:
        Composition.compose("flamingo", {"vision_encoder": "ViT-B-32", "language_model": "./lm"}, layer)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("trainable", ["", " ", ",", " , "])
def test_an_empty_list_of_parts(trainable: str) -> None:
    with pytest.raises(CompositionError, match="--trainable names no part"):
        CompositionRequest(family="flamingo", vision_encoder="a", language_model="b", trainable=trainable).compose()


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "stands for more than 10,000 keys and values"),
        ("&a [*a]", "an alias stands inside the value that it names"),
        ("[" * 50_000, "nested too deeply"),
        ("- " * 3000, "nested too deeply"),
        ("x: " + "1" * 5000, "a number or date that cannot be read"),
        ("x: 2020-99-99", "a number or date that cannot be read"),
        ("x" * 200_000, "larger than 100,000 bytes"),
    ],
)
def test_yaml_that_grows(text: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deeply"),
        ("1" * 5000, "cannot be read"),
        ("{", "not JSON: line 1, character 2"),
    ],
)
def test_json_that_grows(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_ordinary_yaml_is_read() -> None:
    assert parse_yaml("a: &x [1e-4, yes]\nb: *x\nc:\n  <<: {d: 1}") == {
        "a": [1e-4, True],
        "b": [1e-4, True],
        "c": {"d": 1},
    }
