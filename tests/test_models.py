"""What a name means: the demo, a directory, a hub id, a family or a composition file."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlm_cli
from vlm_cli.composition import Composition, CompositionRequest
from vlm_cli.errors import CompositionError, UnknownNameError, UsageError
from vlm_cli.models import DEMO, resolve, resolve_built_model

FILE = "fusion: language-stream\nvision_tokenizer: linear\nvision_encoder: ViT-B-32\nlanguage_model: gpt2\n"


def test_each_kind_of_name(tmp_path: Path) -> None:
    assert resolve(None) == resolve("demo") == str(DEMO)
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("somebody/some-vlm", CompositionRequest(revision="main")) == "somebody/some-vlm"
    family = resolve("flamingo", CompositionRequest(language_model="gpt2"))
    assert isinstance(family, Composition) and family.language_model.name == "gpt2"
    (tmp_path / "parts.yaml").write_text(FILE)
    file = resolve(str(tmp_path / "parts.yaml"), CompositionRequest(overrides=["fusion=cross-attention"]))
    assert isinstance(file, Composition) and file.fusion.type == "cross-attention"
    alone = resolve(None, CompositionRequest(config=tmp_path / "parts.yaml"))
    assert isinstance(alone, Composition) and alone.fusion.type == "language-stream"


def test_names_without_a_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"unknown model 'flamigo'.*Did you mean 'flamingo'\?.*Bundled: demo"):
        resolve("flamigo")
    with pytest.raises(UsageError, match="'flamingo' and --family kosmos name two families"):
        resolve("flamingo", CompositionRequest(family="kosmos"))
    with pytest.raises(CompositionError, match="is built already, so --fusion has no effect"):
        resolve("demo", CompositionRequest(fusion="cross-attention"))
    with pytest.raises(UsageError, match="--revision is for hub ids"):
        resolve("demo", CompositionRequest(revision="main"))


def test_a_composition_has_no_weights_to_load() -> None:
    with pytest.raises(CompositionError, match=r"'flamingo' is a composition without weights\. Build it first"):
        vlm_cli.load("flamingo")
    assert resolve_built_model("demo") == str(DEMO)
    model, processor = vlm_cli.load("demo")
    assert not model.training and processor.tokenizer.pad_token


def test_a_request_over_a_checkpoint_keeps_what_training_fixed() -> None:
    found = {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai", "layer": -2},
        "vision_tokenizer": "mlp",
        "fusion": "language-stream",
        "language_model": {"name": "old", "head_bias": True, "revision": "v1"},
    }
    request = CompositionRequest(vision_encoder="ViT-B-32", language_model="new", revision="v2")
    made = request.compose_over(found)
    assert (made.vision_encoder.name, made.vision_encoder.pretrained, made.vision_encoder.layer) == (
        "ViT-B-32",
        None,
        -2,
    )
    assert (made.language_model.name, made.language_model.head_bias, made.language_model.revision) == (
        "new",
        True,
        None,
    )
    assert request.flags == ["--vision-encoder", "--language-model"]
