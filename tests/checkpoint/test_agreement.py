"""Vocabularies with holes, and what `build` reads back: a token has one id in every file of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import vlm_cli
from examples import tiny_language_model
from tests.support import disk, seed_torch
from vlm_cli.checkpoint import saving
from vlm_cli.checkpoint.agreement import check_agreement
from vlm_cli.checkpoint.building import BuildResult
from vlm_cli.checkpoint.export.formats import export_model
from vlm_cli.doctor import check_invariants
from vlm_cli.errors import CheckpointError, LanguageModelError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Text
from vlm_cli.tokenizer import add_tokens

SIZE = 466  # tokens of the tiny tokenizer
TALK = {"<|user|>": SIZE + 20, "<|end|>": SIZE + 21}


def sparse_tokenizer(words: dict[str, int], special: bool = True) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with more tokens, at these ids, in its table; GPT-4's and Kimi's have special ones so."""
    stored = json.loads(tiny_language_model.make_tokenizer().backend_tokenizer.to_str())
    stored["model"]["vocab"] |= words
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    if special:
        stored["added_tokens"] += [{"id": i, "content": name, "special": True, **flags} for name, i in words.items()]
    backend = Tokenizer.from_str(json.dumps(stored))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """A model on disk whose language model has a token beyond the number of its tokens."""
    folder = tmp_path_factory.mktemp("sparse")
    tokenizer = sparse_tokenizer(TALK)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=SIZE + 64, **sizes, initializer_range=0.2, pad_token_id=None)
    seed_torch(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    tower = disk.tower(folder / "tower")
    added = ["<|endofchunk|>", "<image>"]
    parts = disk.composition(
        f"local-dir:{tower}", str(folder / "lm"), "perceiver", "cross-attention", added_tokens=added
    )
    return vlm_cli.build(parts, folder / "out")


def test_ids_of_the_language_model_stay_its_own(built: BuildResult) -> None:
    model, processor = vlm_cli.load(str(built.out))
    names = [*TALK, "<|endofchunk|>", "<image>", "<pad>"]
    assert processor.tokenizer.convert_tokens_to_ids(names) == [SIZE + i for i in (20, 21, 22, 23, 24)]
    assert (model.config.first_added_id, model.config.media_token_id) == (SIZE + 22, SIZE + 23)
    place = built.out.parent / "lm" if built.out else ""
    bare, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    ids = tokenizer("<|user|>The cat<|end|>", return_tensors="pt").input_ids
    assert processor(text="<|user|>The cat<|end|>", parse_special_tokens=True)["input_ids"].equal(ids)
    with torch.no_grad():
        first = model.config.first_added_id
        assert model(lang_x=ids).logits[..., :first].equal(bare(ids).logits[..., :first])


def test_text_that_spells_a_token_with_a_reserved_id_stays_text(built: BuildResult) -> None:
    ids = built.processor.encode([Text("a<|endofchunk|><pad><image>")])
    assert max(ids) < SIZE and built.processor.decode(ids) == "a<|endofchunk|><pad><image>"


def test_the_exported_language_model_has_its_own_tokens(built: BuildResult, tmp_path: Path) -> None:
    export_model(str(built.out), tmp_path / "lm", "language-model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert tokenizer.get_vocab() == sparse_tokenizer(TALK).get_vocab()


def test_doctor_reads_special_tokens(built: BuildResult, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = built.model, built.processor.tokenizer
    (found,) = check_invariants(model, ["text-only"], tokenizer=tokenizer)
    assert (found.verdict, found.difference, found.note) == ("holds", 0, "")
    # What the number of tokens, taken for the id after the last, made of such a model.
    monkeypatch.setattr(model.config, "first_added_id", SIZE + 2)
    (found,) = check_invariants(model, ["text-only"], tokenizer=tokenizer)
    assert found.verdict == "fails" and found.difference is not None and found.difference > 0.1


def test_a_hole_in_the_table_of_words_hides_no_word() -> None:
    tokenizer = sparse_tokenizer({"zqzq": SIZE + 1}, special=False)
    added, first = add_tokens(tokenizer, ["<|endofchunk|>", "<image>"], SIZE + 64)
    assert (added, first) == (["<|endofchunk|>", "<image>", "<pad>"], SIZE + 2)
    assert tokenizer.convert_ids_to_tokens(SIZE + 1) == "zqzq"


def test_holes_that_cannot_be_filled_are_named() -> None:
    with pytest.raises(LanguageModelError, match=f"ids up to {SIZE + 21}, so no token has the id {SIZE}"):
        add_tokens(sparse_tokenizer(TALK), ["<image>"], SIZE)  # rows end before the hole
    words = Tokenizer.from_str(
        json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
                    "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 2}, "unk_token": "?"}})
    )  # fmt: skip
    # A tokenizer of whole words would read the text `<end>` as the token.
    with pytest.raises(LanguageModelError, match="'<end>' would get the id 3"):
        add_tokens(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?"), ["<end>", "<image>"], 9)


# -- what is read back -------------------------------------------------------------------------------------------------


def test_a_model_is_read_back_before_it_counts_as_written(
    built: BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_with_another_token(processor: VLMProcessor, folder: Path) -> None:
        copy = sparse_tokenizer(TALK)
        add_tokens(copy, ["<image>", "<|endofchunk|>"], SIZE + 64)
        VLMProcessor.save_pretrained(VLMProcessor(processor.image_processor, copy), folder)

    with monkeypatch.context() as patch:
        patch.setattr(
            built.processor, "save_pretrained", lambda folder: save_with_another_token(built.processor, folder)
        )
        with pytest.raises(CheckpointError, match=r"is token 48[89] in the tokenizer in memory, and 48[89] in the"):
            saving.save(built.model, built.processor, tmp_path / "out")
    saving.save(built.model, built.processor, tmp_path / "out")


CONFIG = VLMConfig(first_added_id=2, added_tokens=["<end>", "<image>"], media_token_id=3)
IDS = {"a": 0, "b": 1, "<end>": 2, "<image>": 3}
ROWS = {"added_tokens.embedding.weight": 2, "lang_model.embed.weight": 5}


@pytest.mark.parametrize(
    ("ids", "rows", "problem"),
    [
        ({**IDS, "b": 4}, ROWS, "'b' is token 1 in the tokenizer in memory, and 4 in the tokenizer's files"),
        ({**IDS, "<end>": 4}, ROWS, "'<end>' is token 2 in"),
        ({"a": 0, "b": 1, "<end>": 2}, ROWS, "'<image>' is token 3 in the tokenizer in memory, and None"),
        ({**IDS, "c": 4}, ROWS, "have ids up to 4, and config.json has ids up to 3"),
        (IDS, {"added_tokens.head.weight": 3}, "added_tokens.head.weight has 3 rows, and config.json needs 2"),
        (IDS, {"lang_model.embed.weight": 1}, "lang_model.embed.weight has 1 rows, and config.json needs 2"),
    ],
)
def test_files_that_do_not_agree(ids: dict[str, int], rows: dict[str, int], problem: str) -> None:
    check_agreement(CONFIG, IDS, IDS, ROWS)
    with pytest.raises(CheckpointError, match=problem):
        check_agreement(CONFIG, ids, IDS, rows)
