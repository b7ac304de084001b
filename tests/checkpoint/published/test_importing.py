"""`vlm_cli.import_checkpoint`, and what `vlm build --from` does around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlm_cli
from tests.support.llava import huggingface
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.llava import HuggingFaceLLaVA
from vlm_cli.checkpoint.published.recognising import recognise


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "llava"
    huggingface(folder)
    return folder


def test_any_source_gives_the_same_model(llava):
    opened = PublishedCheckpoint.open(str(llava))
    sources = (llava, str(llava), opened, recognise(opened))
    first, *others = (vlm_cli.import_checkpoint(source).model.state_dict() for source in sources)
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in first.items())


def test_settings_are_laid_over_the_composition(llava):
    model = vlm_cli.import_checkpoint(llava, composition_over={"vision_encoder": {"norm": True}}).model
    encoder = model.config.composition.vision_encoder
    assert encoder.norm and encoder.layer == -2  # the checkpoint's own


def test_a_whole_composition_or_a_function_of_it(llava):
    def train_projector(found):
        return vlm_cli.Composition.compose(None, found, {"trainable": ["vision_tokenizer"]})

    composition = train_projector(recognise(llava).description.composition)
    for over in (composition, train_projector):
        model = vlm_cli.import_checkpoint(llava, composition_over=over).model
        assert model.config.composition == composition
        assert not any(x.requires_grad for x in model.lang_model.parameters())


def test_another_dtype_and_steps(llava):
    steps: list[str] = []
    model = vlm_cli.import_checkpoint(llava, dtype=torch.bfloat16, progress=steps.append).model
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert steps == ["recognised LLaVA (Hugging Face)", "reading 80 tensors"]


@pytest.mark.parametrize("flags", [[], ["--delta"]], ids=str)
def test_a_build_recognises_and_describes_once(vlm, llava, tmp_path, monkeypatch, flags):
    calls: list[str] = []

    def count(name: str) -> None:
        method = getattr(HuggingFaceLLaVA, name)
        monkeypatch.setattr(HuggingFaceLLaVA, name, lambda *args: (calls.append(name), method(*args))[1])

    count("matches")
    count("describe")
    vlm("build", str(tmp_path / "out"), "--from", str(llava), "--quiet", *flags)
    assert calls == ["matches", "describe"]
