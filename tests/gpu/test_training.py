"""A run on a device that is interrupted and resumed ends where one without a break ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlm_cli
from examples import tiny_language_model
from tests.support.training import (
    CROSS_ATTENTION,
    LANGUAGE_STREAM,
    TRAINING_TOWER,
    interrupt_at,
    losses,
    write_pictures_and_records,
)
from vlm_cli.checkpoint.saving import save
from vlm_cli.composition import Composition


def write_model(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "tower.json").write_text(json.dumps(TRAINING_TOWER))
    tiny_language_model.make(folder / "lm")
    parts = {"vision_encoder": str(folder / "tower.json"), "language_model": str(folder / "lm")}
    blueprint = vlm_cli.plan(Composition.compose(None, parts, settings))
    (folder / "vlm").mkdir()
    save(vlm_cli.create(blueprint), blueprint.processor, folder / "vlm")
    return folder / "vlm"


@pytest.mark.parametrize("settings", [CROSS_ATTENTION, LANGUAGE_STREAM], ids=["cross-attention", "language-stream"])
@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["float32", "bf16"])
def test_a_resumed_run_equals_one_without_a_break(settings, flags, device, vlm, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    data = write_pictures_and_records(tmp_path / "data")
    model = write_model(tmp_path, settings)
    shared = ["--data", data / "train.jsonl", "--max-steps", 6, "--batch-size", 4, "--lr", 3e-3, "--device", device]

    def train(out: Path, *more: Any) -> Any:
        return vlm("train", model, "--output", out, *shared, *flags, *more)

    assert train(tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert train(tmp_path / "broken").exit_code == 130
    assert train(tmp_path / "broken", "--resume").exit_code == 0
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    torch.testing.assert_close(broken, whole, atol=1e-5, rtol=1e-5)
    other = vlm("train", model, "--output", tmp_path / "other", *shared, *flags, "--seed", 5)
    assert other.exit_code == 0 and losses(tmp_path / "other") != pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
