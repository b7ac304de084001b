"""A checkpoint that cannot be imported is refused before anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.llava import huggingface
from tests.support.published import rewrite, rewrite_config, write_tokenizer
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import LanguageModelError


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "llava"
    huggingface(folder)
    return folder


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava, tmp_path / "llava"))


def sharded(folder: Path) -> dict[str, str]:
    """Split the checkpoint into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({k: x for k, x in tensors.items() if weight_map[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def build(vlm, source: Path, tmp_path: Path, *flags: str):
    """Run `vlm build --from`, and see that it writes nothing."""
    before = {path.name for path in tmp_path.iterdir()}
    result = vlm("build", str(tmp_path / "out"), "--from", str(source), "--quiet", *flags)
    assert {path.name for path in tmp_path.iterdir()} == before
    return result


def test_shards_are_read(vlm, copy, tmp_path):
    sharded(copy)
    result = vlm("build", str(tmp_path / "out"), "--from", str(copy), "--quiet")
    assert result.exit_code == 0, result.stderr
    assert vlm("generate", "--model", str(tmp_path / "out"), "w1 w2", "-n", "2").exit_code == 0


@pytest.mark.parametrize("where", ["file", "shard"])
def test_a_truncated_file(vlm, copy, tmp_path, where):
    if where == "shard":
        sharded(copy)
    file = max(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1
    assert f"cannot read weights from '{file}'" in result.stderr and "Is it complete?" in result.stderr


def test_a_missing_shard(vlm, copy, tmp_path):
    sharded(copy)
    (copy / "model-2-of-2.safetensors").unlink()
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1
    assert "lacks 1 of the 2 weight files that model.safetensors.index.json names" in result.stderr


def test_an_index_of_other_files(vlm, copy, tmp_path):
    weight_map = sharded(copy)
    weight_map["language_model.model.layers.9.mlp.up_proj.weight"] = "model-1-of-2.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1
    assert "names 1 tensors that are in no file, e.g. 'language_model.model.layers.9" in result.stderr


def test_an_index_of_files_of_another_kind(vlm, copy, tmp_path):
    """A hub repository with both kinds of weights gives one kind, and every small file."""
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model-1-of-2.bin"}}))
    assert vlm("build", str(tmp_path / "out"), "--from", str(copy), "--quiet").exit_code == 0


def test_tensors_in_two_files(vlm, copy, tmp_path):
    tensors = {k: x + 1 for k, x in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "older.safetensors")
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1
    assert f"holds {len(tensors)} tensors twice" in result.stderr
    assert "in model.safetensors and in older.safetensors. Give the path of one file" in result.stderr


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.int8, "(torch.int8): its weights are quantized"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_quantized_weights(vlm, copy, tmp_path, dtype, words):
    """Without their scales, integers are other weights."""
    rewrite(copy, lambda tensors: {k: x.to(dtype) if "up_proj" in k else x for k, x in tensors.items()})
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1 and words in result.stderr and "Give weights that are not" in result.stderr


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": None},
        {"text_config": {"model_type": "nonsense"}},
        {"text_config": {"hidden_act": "nonsense"}},
        {"text_config": {"num_attention_heads": 0}},
        {"vision_config": 5},
        {"vision_config": {"patch_size": 0}},
    ],
    ids=str,
)
def test_a_configuration_of_no_model(vlm, copy, tmp_path, changes):
    config = json.loads((copy / "config.json").read_text())
    rewrite_config(copy, **{k: {**config[k], **x} if isinstance(x, dict) else x for k, x in changes.items()})
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1
    assert f"cannot make a model of the configuration of {str(copy)!r}, which is read as LLaVA" in result.stderr


def test_mixed_dtypes_become_one(copy):
    rewrite(copy, lambda tensors: {k: x.half() if "language_model" in k else x for k, x in tensors.items()})
    checkpoint = PublishedCheckpoint.open(str(copy))
    model = import_checkpoint(checkpoint).model
    assert {p.dtype for p in model.parameters()} == {checkpoint.dtype}
    model = import_checkpoint(checkpoint, dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_foreign_layout(vlm, tmp_path):
    (tmp_path / "x").mkdir()
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "x" / "model.safetensors")
    result = build(vlm, tmp_path / "x", tmp_path)
    assert result.exit_code == 1
    assert "has no layout that vlm knows. Its 1 tensors are called encoder.weight" in result.stderr
    assert "LLaVA (Hugging Face)" in result.stderr and "--weights FILE" in result.stderr


def test_a_configuration_of_other_weights(vlm, copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    rewrite_config(copy, text_config={**config["text_config"], "intermediate_size": 64})
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1
    assert "mlp.up_proj.weight: file [48, 32], model [64, 32]" in result.stderr
    assert "Nothing was written" in result.stderr
    rewrite_config(copy, text_config={**config["text_config"], "num_hidden_layers": 3})
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1 and "lang_model.model.layers.2." in result.stderr


def test_a_missing_tensor(vlm, copy, tmp_path):
    rewrite(copy, lambda tensors: {k: x for k, x in tensors.items() if "linear_2.bias" not in k})
    result = build(vlm, copy, tmp_path)
    assert result.exit_code == 1 and "1 tensor missing: vision_tokenizer.proj.2.bias" in result.stderr


def test_a_tensor_too_many_is_told(vlm, copy, tmp_path):
    rewrite(copy, lambda tensors: {**tensors, "model.image_newline": torch.zeros(4)})
    result = vlm("build", str(tmp_path / "out"), "--from", str(copy), "--quiet", "--json")
    assert result.exit_code == 0 and "1 tensor not used: model.image_newline" in result.stderr
    assert json.loads(result.stdout)["keys"]["unused"] == ["model.image_newline"]


class Exploit:
    def __reduce__(self):
        return (print, ("run",))


def test_code_in_a_file_is_never_run(vlm, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    with file.open("wb") as opened:
        pickle.dump({"model_state_dict": Exploit()}, opened)
    result = build(vlm, file, tmp_path)
    assert result.exit_code == 1 and "cannot read weights" in result.stderr and "never code" in result.stderr
    assert "run" not in capsys.readouterr().out.split()


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_a_file_of_something_else(vlm, tmp_path, name):
    (tmp_path / name).write_text("{}")
    result = build(vlm, tmp_path / name, tmp_path)
    assert result.exit_code == 1 and "it is no complete file of tensors" in result.stderr
    assert "weights_only" not in result.stderr  # torch's advice to run what is inside


@pytest.mark.parametrize("name", ["", "nowhere", "./nowhere/x", "a/b/c"])
def test_nothing_there(vlm, tmp_path, name):
    result = vlm("build", str(tmp_path / "out"), "--from", name)
    assert result.exit_code == 1 and f"there is no file or directory {name!r}" in result.stderr


def test_a_hub_id_offline(vlm, tmp_path):
    result = vlm("build", str(tmp_path / "out"), "--from", "org/name")
    assert result.exit_code == 1 and "cannot fetch 'org/name'" in result.stderr and "HF_HOME" in result.stderr


def test_wrong_usage(vlm, tmp_path):
    result = vlm("build", str(tmp_path / "out"), "--from", "x", "--random-weights")
    assert result.exit_code == 2 and "--from brings all weights" in result.stderr


def test_a_delta_of_a_whole_checkpoint(vlm, copy, tmp_path):
    result = build(vlm, copy, tmp_path, "--delta")
    assert result.exit_code == 2 and "brings a vision encoder and a language model of its own" in result.stderr


@pytest.mark.parametrize(
    ("flag", "name", "code", "words"),
    [
        ("--vision-encoder", "ViT-B-33", 2, "unknown vision encoder 'ViT-B-33'. Did you mean"),
        ("--language-model", "./gone", 1, "there is no directory './gone'"),
    ],
)
def test_an_unknown_part_in_the_place_of_its_own(vlm, copy, tmp_path, flag, name, code, words):
    result = build(vlm, copy, tmp_path, flag, name)
    assert result.exit_code == code and words in result.stderr


@pytest.mark.parametrize("setting", ["pretrained=openai", "image_size=64", "depth=1"])
def test_a_tower_of_another_kind(vlm, copy, tmp_path, setting):
    """The setting would change nothing: the checkpoint's own tower is used."""
    result = build(vlm, copy, tmp_path, "--set", f"vision_encoder.{setting}")
    assert (
        result.exit_code == 2
        and f"so vision_encoder.{setting} cannot change it. Leave the setting out" in result.stderr
    )


def test_dry_run_writes_nothing(vlm, copy, tmp_path):
    result = vlm("build", "--from", str(copy), "--dry-run")
    assert result.exit_code == 0 and "Layout: LLaVA (Hugging Face)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_the_tokenizer_of_another_model(copy):
    for file in copy.glob("token*"):
        file.unlink()
    write_tokenizer(copy)  # without <image>
    with pytest.raises(LanguageModelError, match="Give the tokenizer that belongs to the weights"):
        import_checkpoint(PublishedCheckpoint.open(str(copy)))


def test_a_directory_of_ours(vlm, copy, tmp_path):
    assert vlm("build", str(tmp_path / "ours"), "--from", str(copy), "--quiet").exit_code == 0
    result = build(vlm, tmp_path / "ours", tmp_path)
    assert result.exit_code == 1 and "is a directory of vlm already" in result.stderr


def test_a_wrong_setting_is_the_only_problem(vlm, copy, tmp_path):
    result = build(vlm, copy, tmp_path, "--set", "vision_tokenizer.width=3")
    assert result.exit_code == 2 and "unknown key vision_tokenizer.width" in result.stderr
    assert "unknown vision encoder" not in result.stderr
