"""A tokenizer of SentencePiece or tiktoken, without a tokenizer.json: its packages read it, or are named."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaConfig

from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.parts.tokenizer_packages import explain_missing_packages
from vlm_cli.composition import LanguageModelOptions
from vlm_cli.errors import LanguageModelError

_WORDS = ["cat", "dog", "bird", "tree", "house", "car", "boat", "train", "plane", "sun", "moon", "star"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's configuration and a tokenizer.model, as older checkpoints are published."""
    folder, model = tmp_path_factory.mktemp("lm"), io.BytesIO()
    texts = [f"a photo of {word} number {i}" for i, word in enumerate(_WORDS * 5)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=80, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    LlamaConfig(vocab_size=80, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    return folder


def test_tokenizer_model_is_read_as_sentencepiece_reads_it(saved: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(saved / "tokenizer.model"))
    ours = find_language_model(LanguageModelOptions(name=str(saved))).tokenizer()
    for text in ("a photo of cat number 7", "moon house", "star"):
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("sentencepiece", "sentencepiece"),
        ("google.protobuf", "protobuf"),
        ("sentencepiece.sentencepiece_model_pb2", "a newer protobuf"),
    ],
)
def test_each_missing_package_is_named_with_the_extra(
    module: str, package: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("vlm_cli.checkpoint.parts.language_models.load_tokenizer", _fails)
    with pytest.raises(LanguageModelError) as error:
        find_language_model(LanguageModelOptions(name=str(saved))).tokenizer()
    assert f"needs {package}. Install what it needs: pip install 'vlm-cli[sentencepiece]'" in str(error.value)


def test_lines_of_tiktoken_need_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"a") + b" 0\n")
    assert explain_missing_packages(str(tmp_path)) is None
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "of tiktoken and no tokenizer.json, and needs tiktoken." in str(explain_missing_packages(str(tmp_path)))
    (tmp_path / "tokenizer.json").touch()
    assert explain_missing_packages(str(tmp_path)) is None


def _fails(*args: object, **keywords: object) -> None:
    raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")
