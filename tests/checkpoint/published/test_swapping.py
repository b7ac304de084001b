"""Other parts in the place of a published model's own: what is kept, what starts anew, and what is said of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlm_cli
from tests.support import disk
from tests.support.grid_models import aya_vision, cohere2_vision, internvl
from tests.support.llava import huggingface
from tests.support.published import Case
from tests.support.swaps import check_swap, other_parts
from vlm_cli.errors import CheckpointError, CompositionError, LanguageModelError, UnknownNameError

PERCEIVER = ("vision_tokenizer.depth=1", "vision_tokenizer.num_latents=4")
#: The part that is replaced -> the parts that start anew in LLaVA.
NEW = {
    "language_model": {"vision_tokenizer", "added_tokens", "language_model"},
    "vision_encoder": {"vision_encoder", "vision_tokenizer"},
    "vision_tokenizer": {"vision_tokenizer"},
    "fusion": {"fusion"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    others = other_parts(tmp_path_factory.mktemp("parts"))
    return {**others, "vision_tokenizer": "perceiver", "fusion": "cross-attention"}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return huggingface(tmp_path_factory.mktemp("published") / "llava")


@pytest.fixture(scope="module")
def own(llava: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of vlm, made of the same checkpoint."""
    out = tmp_path_factory.mktemp("own") / "vlm"
    vlm_cli.build_from_checkpoint(llava.source, out)
    return out


@pytest.mark.sample(1)
@pytest.mark.parametrize("part", NEW)
def test_parts_that_nobody_replaces_are_kept_bit_for_bit(llava: Case, parts: dict[str, str], part: str) -> None:
    sizes = {"vision_tokenizer": PERCEIVER, "fusion": ("fusion.num_heads=2",)}.get(part, ())
    found = check_swap(llava.source, NEW[part], sizes=sizes, **{part: parts[part]})
    state = found.model.state_dict()
    if part == "language_model":
        theirs = load_file(Path(parts[part]) / "model.safetensors")
        assert all(torch.equal(state[f"lang_model.{name}"], x) for name, x in theirs.items())
        mean = state["lang_model.model.embed_tokens.weight"].mean(0)
        assert (state["added_tokens.embedding.weight"] - mean).abs().max() < 0.1
    if part == "vision_encoder":
        folder = Path(parts[part].removeprefix("local-dir:"))
        theirs = load_file(folder / "open_clip_model.safetensors")
        assert all(torch.equal(state[f"vision_encoder.{name}"], x) for name, x in theirs.items())


@pytest.mark.matrix
@pytest.mark.parametrize("part", ["language_model", "vision_encoder"])
@pytest.mark.parametrize("make", [aya_vision, cohere2_vision, internvl])
def test_models_that_cut_pictures(tmp_path: Path, parts: dict[str, str], make: Any, part: str) -> None:
    """Their added tokens have rows that no checkpoint fills, and that are those of a plain import."""
    check_swap(make(tmp_path / "published").source, NEW[part], **{part: parts[part]})


@pytest.mark.matrix
@pytest.mark.parametrize("part", ["language_model", "vision_encoder"])
def test_a_directory_of_vlm_is_taken_apart_like_a_checkpoint(
    llava: Case, own: Path, parts: dict[str, str], part: str
) -> None:
    found, same = (
        vlm_cli.import_checkpoint(x, composition_over={part: parts[part]}, seed=3) for x in (own, llava.source)
    )
    assert found.layout.name == "vlm" and found.report.new == same.report.new
    theirs = same.model.state_dict()
    for name, x in found.model.state_dict().items():
        assert torch.equal(x, theirs[name]), name
    again = vlm_cli.import_checkpoint(own, composition_over={part: parts[part]}, seed=4).model.state_dict()
    changed = {name.partition(".")[0] for name, x in again.items() if not torch.equal(x, theirs[name])}
    assert "vision_tokenizer" in changed and changed <= {"vision_tokenizer", "added_tokens"}  # the twin


@pytest.mark.matrix
def test_a_build_says_which_tensors_were_kept(vlm: Any, llava: Case, parts: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--from", llava.source, "--language-model", parts["language_model"], "--quiet"]
    dry, built = vlm("build", "--dry-run", *flags), vlm("build", out, *flags)
    assert dry.exit_code == built.exit_code == 0
    assert dry.stderr.splitlines() == built.stderr.splitlines()[:-1]
    for line in (
        "Note: vision_encoder: 44 tensors kept.",
        "Note: vision_tokenizer: 4 tensors new, random weights.",
        f"Note: language_model: 39 tensors new, the weights of {parts['language_model']!r}.",
        "Note: added_tokens: 2 tensors new, they start at the mean of the language model's rows.",
    ):
        assert line in built.stderr.splitlines()
    assert "25 tensors of replaced parts left out" in built.stderr and "45 tensors new" in built.stderr
    model, processor = vlm_cli.load(str(out))
    theirs = vlm_cli.import_checkpoint(llava.source).model
    kept = theirs.vision_encoder.state_dict()
    assert all(torch.equal(x, kept[name]) for name, x in model.vision_encoder.state_dict().items())
    assert processor.tokenizer.get_vocab().keys() > {"<image>", "Ġcat"}
    answer = vlm("generate", "-m", out, "-n", 2, "The cat")
    assert answer.exit_code == 0


@pytest.mark.matrix
def test_a_part_of_the_same_type_replaces_nothing(vlm: Any, llava: Case) -> None:
    words = (
        "Note: --vision-tokenizer {} names the type of the checkpoint's own vision tokenizer, so nothing is replaced."
    )
    for name in ("mlp", "linear"):
        result = vlm("build", "--dry-run", "--from", llava.source, "--vision-tokenizer", name, "--quiet")
        assert result.exit_code == 0
        assert (words.format(name) in result.stderr) == (name == "mlp") == ("new, random" not in result.stderr)


def test_bad_swaps(llava: Case, own: Path, parts: dict[str, str]) -> None:
    def swap(source: Any = llava.source, **over: Any) -> None:
        vlm_cli.import_checkpoint(source, composition_over=over)

    with pytest.raises(CheckpointError, match=r"is a directory of vlm already.* or name another part"):
        swap(own)
    with pytest.raises(CompositionError, match="every part of the checkpoint would be replaced"):
        swap(language_model=parts["language_model"], vision_encoder=parts["vision_encoder"])
    with pytest.raises(UnknownNameError, match="unknown vision encoder 'ViT-B-33'"):
        swap(vision_encoder="ViT-B-33")
    with pytest.raises(LanguageModelError, match=r"there is no directory '\./gone'"):
        swap(language_model="./gone")
    with pytest.raises(CompositionError, match=r"vision_tokenizer\.dim_out=8 does not fit"):
        swap(vision_tokenizer={"type": "linear", "dim_out": 8})


@pytest.mark.matrix
def test_a_random_part_that_would_not_train_is_named(llava: Case, tmp_path: Path) -> None:
    (tower := tmp_path / "tower.json").write_text(json.dumps(disk.TOWER))
    over = {"fusion": {"type": "cross-attention", "num_heads": 2}, "vision_encoder": str(tower)}
    notes = vlm_cli.import_checkpoint(llava.source, composition_over=over).notes
    assert any(note.startswith("fusion is random and would not train: add --trainable ") for note in notes)
    assert any("names no pretrained weights, so its weights are random" in note for note in notes)
