"""`TrainingSettings` is the only source of the options of `vlm train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import typer.main

import vlm_cli.cli.train as train_module
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
        assert option.metavar == (setting.flag.metavar or "|".join(setting.choices))
        assert setting.flag.metavar is None or all(choice in setting.flag.help for choice in setting.choices)
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


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--per-device-train-batch-size 3", "batch_size", 3),
        ("--per_device_train_batch_size=3", "batch_size", 3),
        ("--gradient-accumulation-steps 4", "gradient_accumulation", 4),
        ("--learning-rate 0.01", "learning_rate", 0.01),
        ("--lr vision-tokenizer=1e-3,1e-5", "learning_rate", {"vision_tokenizer": 1e-3, "others": 1e-5}),
        ("--weight_decay 0.3,fusion=0", "weight_decay", {"others": 0.3, "fusion": 0.0}),
        ("--warmup-ratio 0.2", "warmup_steps", 0.2),
        ("--lr-scheduler-type inverse_sqrt", "schedule", "inverse_sqrt"),
        ('--lr_scheduler_kwargs {"min_lr_rate":0.1}', "schedule_options", {"min_lr_rate": 0.1}),
        (
            "--schedule-options num_decay_steps=9,decay_type=linear",
            "schedule_options",
            {"num_decay_steps": 9, "decay_type": "linear"},
        ),
        ("--save-steps 7", "save_every", 7),
        ("--logging-steps 7", "log_every", 7),
        ("--num-train-epochs 2", "epochs", 2.0),
        ("--dataloader-num-workers 0", "workers", 0),
    ],
)
def test_spellings_of_transformers_set_our_settings(
    words: str, name: str, value: Any, monkeypatch: Any, vlm: Any
) -> None:
    seen: list[TrainingSettings] = []
    monkeypatch.setattr(train_module, "_run", lambda job, settings, *more: seen.append(settings))
    monkeypatch.setattr(train_module, "resolve_built_model", lambda model: model)
    result = vlm("train", "m", "--data", "d", "--output", "o", *words.split())
    assert result.exit_code == 0, result.stderr
    assert seen[0].to_dict() == TrainingSettings().to_dict() | {name: value}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-size 3 --per-device-train-batch-size 3", "are two names of one option"),
        ("--warmup-ratio 1.0", "--warmup-ratio must be below 1, got 1.0. For more, give --warmup-steps."),
        (
            "--lr fast",
            "--learning-rate expects a number, such as 1e-4, or numbers for parts, such as 1e-4,vision_encoder=1e-5",
        ),
        ("--lr fusion=1,fusion=2", "--learning-rate gives two numbers to fusion"),
        ("--lr fusio=1", "--learning-rate names 'fusio'. Did you mean 'fusion'? Known: "),
        ("--lr fusion=-1", "--learning-rate must be above 0, got -1.0 for fusion."),
        ("--schedule-options min_lr_rate", "--schedule-options expects NAME=X,… or a JSON object, got 'min_lr_rate'"),
        (
            "--lr-scheduler-type greedy",
            "A schedule that follows the loss, such as reduce_lr_on_plateau, is not possible.",
        ),
    ],
)
def test_spellings_that_contradict(words: str, message: str, vlm: Any) -> None:
    result = vlm("train", "m", "--data", "d", "--output", "o", *words.split())
    assert result.exit_code == 2 and message in " ".join(result.stderr.replace("│", " ").split())


def test_a_choice_has_a_hint() -> None:
    setting = Setting("size", Literal["small", "large"], "small", Flag(help="Size.", heading="Shape", hint="Measure."))
    assert setting.find_problem("smal") == "unknown size 'smal'. Did you mean 'small'? Known: small, large. Measure."
    assert setting.find_problem("small") is None and setting.find_problem(None) is None
