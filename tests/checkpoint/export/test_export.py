"""`vlm export`: what other programs read gives what the model gives."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

import vlm_cli
from tests.support import disk, tiny
from tests.support.disk import run
from tests.support.grid import first_of
from vlm_cli.checkpoint.export import programs
from vlm_cli.checkpoint.export.agreement import check_agreement
from vlm_cli.checkpoint.export.formats import find_format
from vlm_cli.errors import CheckpointError, UsageError

CLOSE = {"atol": 1e-4, "rtol": 0}  # float32, through different kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`lm`, `tower`, and a model of each fusion."""
    path = tmp_path_factory.mktemp("export")
    lm, tower = disk.language_model(path / "lm"), disk.tower(path / "tower")
    named = f"local-dir:{tower}", str(lm)
    disk.write(path / "flamingo", disk.composition(*named, "perceiver", "cross-attention"))
    llava = {"vision_encoder": {"layer": -2}}
    disk.write(path / "llava", disk.composition(*named, "mlp", "language-stream", **llava))
    return path


def exported(folder: Path, model: str, kind: str, out: Path) -> dict:
    result = run("export", folder / model, out, "--format", kind, "--json")
    assert result.exit_code == 0, result.output
    assert f"exporting {kind}" in result.stderr
    return json.loads(result.stdout)


# -- the language model alone ------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("model", first_of(["llava", "flamingo"]))
@torch.no_grad()
def test_the_language_model_is_the_one_that_was_published(folder, tmp_path, model):
    report = exported(folder, model, "language-model", tmp_path / "out")
    assert report["format"] == "language-model" and report["files"].keys() >= {"config.json", "model.safetensors"}
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "lm"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], x) for name, x in theirs.items())
    ids = torch.tensor([[5, 6, 7, 300]])
    back, bare = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", folder / "lm"))
    assert torch.equal(back(ids).logits, bare(ids).logits)
    with tiny.nudged(bare.model.norm.weight):
        assert not torch.equal(back(ids).logits, bare(ids).logits)


def test_the_tokenizer_knows_none_of_our_tokens(folder, tmp_path):
    exported(folder, "flamingo", "language-model", tmp_path / "out")
    back, bare, ours = (
        AutoTokenizer.from_pretrained(x) for x in (tmp_path / "out", folder / "lm", folder / "flamingo")
    )
    text = "The cat <image> sits.</s>"
    assert back(text).input_ids == bare(text).input_ids != ours(text).input_ids
    assert back.get_vocab() == bare.get_vocab() and back.special_tokens_map == bare.special_tokens_map
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id) == (bare.eos_token_id, None)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["language-model", "llava"])
def test_sampling_settings_of_a_greedy_model_do_not_stop_an_export(folder, tmp_path, kind):
    """Transformers reads a directory with `top_k` and no `do_sample`, and refuses to write one."""
    shutil.copytree(folder / "llava", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top_k": 5}))
    exported(tmp_path, "model", kind, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_k is None


# -- the vision side ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def vision_tokens(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    model, _ = vlm_cli.load(str(folder))
    return model.encode_vision(pixels[:, None, None])[0][:, 0]


@pytest.mark.matrix
def test_the_vision_side_is_a_program_for_any_batch(folder, tmp_path):
    report = exported(folder, "flamingo", "torch-export", tmp_path / "out")
    assert report["input"] == ["N", 3, 32, 32] and report["output"] == ["N", 3, 48]
    program = torch.export.load(tmp_path / "out/vision.pt2").module()
    pixels = torch.randn(5, 3, 32, 32)
    wanted = vision_tokens(folder / "flamingo", pixels)
    torch.testing.assert_close(program(pixels), wanted, **CLOSE)
    assert (program(pixels + 0.01) - wanted).abs().max() > 1e-4


@pytest.mark.matrix
def test_a_program_that_differs_is_not_written(folder, tmp_path, monkeypatch):
    class Other:
        def module(self):
            return lambda pixels: torch.zeros(len(pixels), 16, 64)

    monkeypatch.setattr(torch.export, "load", lambda file: Other())
    result = run("export", folder / "llava", tmp_path / "out", "--format", "torch-export")
    assert result.exit_code == 1 and "the program differs from the model" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix
def test_a_tower_whose_batch_is_fixed_says_so(folder, tmp_path, monkeypatch):
    real = torch.export.export

    def strict(side, inputs, dynamic_shapes=None):
        if dynamic_shapes:
            raise ValueError("specialized")
        return real(side, inputs)

    monkeypatch.setattr(torch.export, "export", strict)
    report = exported(folder, "llava", "torch-export", tmp_path / "out")
    assert report["input"][0] == 1 and report["output"] == [1, 16, 64]


@pytest.mark.matrix
def test_the_vision_side_as_onnx(folder, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    report = exported(folder, "llava", "vision-onnx", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out/vision.onnx")
    assert report["input"] == ["N", 3, 32, 32] and session.get_inputs()[0].shape[1:] == [3, 32, 32]
    pixels = torch.randn(5, 3, 32, 32)
    wanted = vision_tokens(folder / "llava", pixels)
    found = torch.from_numpy(session.run(["tokens"], {"pixels": pixels.numpy()})[0])
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_onnx_names_what_is_not_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name == "onnxscript" else name)
    result = run("export", folder / "llava", tmp_path / "out", "--format", "vision-onnx")
    assert result.exit_code == 2 and "needs onnxscript. Install it: pip install 'vlm-cli[onnx]'" in result.stderr


def test_agreement_is_measured():
    ours = torch.tensor([1.0, -200.0])
    assert check_agreement("x", ours, ours + 0.01) == pytest.approx(5e-5, rel=0.1)
    for theirs in (ours + 0.1, ours * torch.nan):
        with pytest.raises(CheckpointError, match="x differs from the model"):
            check_agreement("x", ours, theirs)
    with pytest.raises(CheckpointError, match=r"x gives \[1\], the model \[2\]"):
        check_agreement("x", ours, ours[:1])


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch-export", "vision-onnx"])
def test_a_program_knows_no_tiles(name):
    config = tiny.config(tiling={"type": "grid"}, tokenizer="linear")
    with pytest.raises(UsageError, match="reads one view, and this model's tiling is grid"):
        find_format(name).check(config)


def test_a_refusal_comes_before_weights_are_read(folder, tmp_path):
    broken = folder / "flamingo-without-weights"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "flamingo/config.json").read_bytes())
    result = run("export", broken, tmp_path / "out", "--format", "llava")
    assert result.exit_code == 2
    assert "fusion is cross-attention" in result.stderr and "vision_tokenizer is perceiver" in result.stderr


# -- where it is written -----------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_what_was_exported_may_be_replaced_and_nothing_else(folder, tmp_path):
    out = tmp_path / "out"
    exported(folder, "llava", "language-model", out)
    result = run("export", folder / "llava", out, "--format", "language-model")
    assert result.exit_code == 2 and "add --overwrite" in result.stderr
    assert run("export", folder / "llava", out, "-f", "llava", "--overwrite", "--quiet").exit_code == 0
    assert json.loads((out / "vlm_export.json").read_text())["format"] == "llava"
    (out / "vlm_export.json").unlink()
    result = run("export", folder / "llava", out, "-f", "llava", "--overwrite")
    assert result.exit_code == 2 and "not a directory that vlm wrote" in result.stderr


def test_a_model_is_not_replaced_by_its_own_export(folder, tmp_path):
    before = {x.name: x.read_bytes() for x in (folder / "llava").iterdir()}
    (tmp_path / "same").symlink_to(folder / "llava")
    for out in (folder / "llava", tmp_path / "same"):
        result = run("export", folder / "llava", out, "-f", "language-model", "--overwrite")
        assert result.exit_code == 2 and "is the model that is exported" in result.stderr
    assert before == {x.name: x.read_bytes() for x in (folder / "llava").iterdir()}


def test_an_unknown_format(folder, tmp_path):
    result = run("export", folder / "llava", tmp_path / "out", "--format", "lava")
    assert result.exit_code == 2 and "unknown format 'lava'. Did you mean 'llava'?" in result.stderr


@pytest.mark.parametrize("kind", first_of(["language-model", "torch-export"]))
def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, kind):
    """Safetensors says so with an error of its own; torch's writer of programs would end the process."""

    def write_bytes(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_file(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)
    result = run("export", folder / "flamingo", tmp_path / "out", "--format", kind)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr and "Nothing was changed" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix
def test_the_old_name_of_a_format_still_works(folder, tmp_path):
    result = run("export", folder / "llava", tmp_path / "out", "--format", "vision-program", "--json")
    assert result.exit_code == 0, result.output
    assert "Note: the format vision-program is now called torch-export." in result.stderr
    assert json.loads(result.stdout)["format"] == "torch-export"
    mark = tmp_path / "out/vlm_export.json"
    mark.write_text(mark.read_text().replace("torch-export", "vision-program"))  # as an earlier version wrote it
    again = run("export", folder / "llava", tmp_path / "out", "--format", "language-model", "--overwrite")
    assert again.exit_code == 0, again.output
