"""`TrainingSettings` is the only source of the options of `vlm train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import typer.main

from vlm_cli.cli.app import app
from vlm_cli.errors import UsageError
from vlm_cli.flags import Flag, Setting, list_settings
from vlm_cli.training.settings import TrainingSettings

SETTINGS = list_settings(TrainingSettings)


def options() -> dict[str, Any]:
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.sample(2)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_is_an_option(setting: Setting) -> None:
    option = options()[setting.name]
    assert option.default == setting.default == getattr(TrainingSettings(), setting.name)
    assert option.opts[0] == setting.spelling and option.help == setting.flag.help
    assert option.rich_help_panel == setting.flag.heading
    if setting.choices:
        assert option.metavar == "|".join(setting.choices)
    elif setting.type is not bool:
        assert option.metavar, "say what the user types"


def test_each_field_has_a_flag() -> None:
    assert [setting.name for setting in SETTINGS] == list(TrainingSettings().to_dict())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, "--seed must be 0 or more, got -1."),
        ({"seed": 2**32}, "--seed must be at most 4,294,967,295, got 4294967296."),
        ({"max_minutes": float("inf")}, "--max-minutes must be a finite number, got inf."),
        ({"warmup_steps": -0.1}, "--warmup-steps must be 0 or more, got -0.1."),
        ({"dtype": "float8"}, "unknown dtype 'float8'. Did you mean 'float32'?"),
        ({"device": "cuda"}, "Known: auto, cpu. To choose one of several GPUs,"),
        ({"optimizer": "sgd", "epochs": 0}, "--epochs must be above 0, got 0."),
    ],
)
def test_impossible_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        TrainingSettings(**values)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == len(values)


def test_settings_are_plain_data() -> None:
    assert json.loads(json.dumps(TrainingSettings(trainable=("fusion",)).to_dict()))["trainable"] == ["fusion"]


@pytest.mark.parametrize(
    ("old", "new", "value"), [("--clip", "--max-grad-norm", "0.5"), ("--warmup", "--warmup-steps", "2")]
)
def test_old_names_of_options_still_work(vlm: Any, old: str, new: str, value: str, tmp_path: Path) -> None:
    result = vlm("train", "flamingo", "--data", tmp_path, "--output", tmp_path / "out", old, value)
    assert result.exit_code == 2 and "composition without weights" in result.stderr  # the option itself was accepted
    assert f"Note: {old} is now called {new}." in result.stderr


def test_a_choice_has_a_hint() -> None:
    setting = Setting("size", Literal["small", "large"], "small", Flag(help="Size.", heading="Shape", hint="Measure."))
    assert setting.find_problem("smal") == "unknown size 'smal'. Did you mean 'small'? Known: small, large. Measure."
    assert setting.find_problem("small") is None and setting.find_problem(None) is None
