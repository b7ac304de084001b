"""`vlm build OUT --from DELTA` makes a delta directory whole, with its record and what a person wrote into its card."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.support import disk
from vlm_cli.report.card_sections import Card

RECORDS = ("training_args.json", "metrics.jsonl", "metrics-1-align.jsonl", "loss.png", "run.html")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with the record of a run, and notes of a person."""
    folder = tmp_path_factory.mktemp("completing")
    lm, tower = disk.language_model(folder / "lm"), disk.tower(folder / "tower")
    parts = disk.composition(f"local-dir:{tower}", str(lm), "mlp", "language-stream")
    parts_file = disk.write(folder / "drawn", parts) / "composition.yaml"
    assert disk.run("build", folder / "model", "--config", parts_file, "-q").exit_code == 0
    model = folder / "model"
    result = {"steps": 20, "records": 1000, "loss": 1.25, "eval_loss": None}
    for name in RECORDS:
        (model / name).write_text(json.dumps({"result": result}))
    card = model / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\n## Mine\n\nBy hand.\n")
    return model


@pytest.fixture(scope="module")
def delta(trained):
    found = disk.run("export", trained, trained.parent / "delta", "--format", "delta")
    assert found.exit_code == 0 and "vlm build WHOLE --from" in found.stderr
    return trained.parent / "delta"


def check_record(folder, trained):
    for name in RECORDS:
        assert (folder / name).read_bytes() == (trained / name).read_bytes()
    card = Card.parse((folder / "README.md").read_text())
    assert card.own_text == "## Mine\n\nBy hand." and card.metadata["license"] == "mit"
    assert "20 steps on 1,000 records" in card.sections["model"] and f"# {folder.name}" in card.sections["model"]


def test_a_delta_keeps_record_and_card_and_becomes_whole_again(trained, delta, vlm):
    check_record(delta, trained)
    whole = trained.parent / "whole"
    result = vlm("build", whole, "--from", delta)
    assert result.exit_code == 0, result.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, trained))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(x) for name, x in theirs.items())
    assert not json.loads((whole / "config.json").read_text()).get("backbones")
    check_record(whole, trained)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--delta"], "is a delta directory already"),
        (["--language-model", "org/other"], "of which no part can be replaced. Make it whole first"),
        (["--set", "vision_tokenizer.norm=layer"], "of which no part can be replaced"),
    ],
)
def test_what_a_delta_cannot_become(delta, vlm, tmp_path, more, words):
    result = vlm("build", tmp_path / "out", "--from", delta, *more)
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
