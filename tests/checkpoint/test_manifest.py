"""A directory holds what was written into it, or `vlm` says so; files hold no more than their configuration says."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.gguf_file import write_gguf
from vlm_cli import load, manifest
from vlm_cli.checkpoint.directory import read_config
from vlm_cli.checkpoint.parts.gguf_tensors import count_gguf_elements
from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.surplus import find_surplus
from vlm_cli.composition import LanguageModelOptions
from vlm_cli.errors import CheckpointError, LanguageModelError, VLMWarning
from vlm_cli.manifest import MANIFEST_FILE, compare_files, recording, sign
from vlm_cli.models import DEMO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo with a manifest of it."""
    copied = Path(shutil.copytree(DEMO, tmp_path / "model"))
    sign(copied)
    return copied


def change(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- the manifest ------------------------------------------------------------------------------------------------------


def test_a_manifest_names_what_loaders_read(folder: Path) -> None:
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    read = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "generation_config.json"}
    assert read <= files.keys() and not {"README.md", "training_args.json", MANIFEST_FILE} & files.keys()
    for name, record in files.items():
        data = (folder / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_directory_as_it_was_written_loads_in_silence(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    (folder / "notes.txt").write_text("a file that the manifest does not name\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", VLMWarning)
        read_config(str(folder), verify=True)
        (folder / MANIFEST_FILE).unlink()
        change(folder / "model.safetensors")
        read_config(str(folder), verify=True)  # a directory of an earlier version has no manifest


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "composition.yaml"])
def test_an_edited_file_is_told(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.warns(VLMWarning, match=f"{name} of .* differs from what was written.*vlm doctor .* --sign"):
        read_config(str(folder))
    sign(folder)
    test_a_directory_as_it_was_written_loads_in_silence(folder)


def test_a_command_tells_it_once(folder: Path, vlm: Callable[..., Any]) -> None:
    for name in ("generation_config.json", "processor_config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
    # The command reads the directory twice.
    result = vlm("export", folder, folder.parent / "out", "--format", "language-model", "--quiet")
    assert result.exit_code == 0
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
    assert "generation_config.json, processor_config.json of" in note and "differ from what was written" in note
    assert vlm("doctor", folder, "--sign").exit_code == 0
    assert "Note: " not in vlm("inspect", folder).stderr
    exported = json.loads((folder.parent / "out" / MANIFEST_FILE).read_text())["files"]
    assert {"config.json", "model.safetensors"} <= exported.keys()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change, "has another SHA-256 hash"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has 5,695,647 bytes instead of 5,695,648"),
        (Path.unlink, "is missing"),
    ],
)
def test_other_weights_are_an_error(folder: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"weights that it was written with: model.safetensors {words}"):
        load(str(folder))


def test_large_weights_are_hashed_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_SMALL", 1000)
    change(folder / "model.safetensors")
    report = compare_files(folder)
    assert report is not None and report.unread == 1 and not report.wrong
    read_config(str(folder))
    with pytest.raises(CheckpointError, match="another SHA-256 hash"):
        load(str(folder), verify=True)


def test_writing_into_a_directory_keeps_what_is_known_of_other_files(folder: Path) -> None:
    model, processor = load(str(folder))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with torch.no_grad():
        model.added_tokens.embedding.weight.add_(1)
    model.save_pretrained(folder)
    report = compare_files(folder)
    assert report is not None and report.edited == ["tokenizer.json"] and not report.wrong
    processor.save_pretrained(folder)
    report = compare_files(folder)
    assert report is not None and not report.edited


def test_an_interrupted_write_leaves_no_manifest(folder: Path) -> None:
    with pytest.raises(RuntimeError), recording(folder):
        change(folder / "model.safetensors")
        raise RuntimeError
    assert not (folder / MANIFEST_FILE).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "it is not JSON"),
        ('{"files": []}', "files must be a mapping"),
        ('{"files": {"a.json": {"bytes": -1, "sha256": "0"}}}', "files.a.json.bytes must be"),
        ('{"files": {"../a.json": {"bytes": 1, "sha256": "' + 64 * "0" + '"}}}', "no file of the directory"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, content: str, words: str) -> None:
    (folder / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=rf"vlm_manifest\.json' is not valid: .*{words}.*--sign"):
        read_config(str(folder))


def test_only_what_vlm_wrote_is_signed(tmp_path: Path, vlm: Callable[..., Any]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = vlm("doctor", tmp_path, "--sign")
    assert result.exit_code == 1 and "no directory that vlm wrote" in result.stderr
    result = vlm("doctor", "flamingo", "--sign")
    assert result.exit_code == 2 and "--sign needs the directory" in result.stderr


# -- files that hold more than the configuration says ------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from examples import tiny_language_model

    return tiny_language_model.make(tmp_path_factory.mktemp("surplus") / "lm")


def load_language_model(place: Path) -> Any:
    return find_language_model(LanguageModelOptions(name=str(place))).load()


def edit(source: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    return target


@pytest.mark.parametrize("layers", [1, 3])
def test_a_configuration_with_fewer_layers_than_the_weights(language_model: Path, tmp_path: Path, layers: int) -> None:
    load_language_model(language_model)
    with pytest.raises(LanguageModelError, match=rf"hold {9 * (4 - layers)} tensors that .*model\.layers\.{layers}\."):
        load_language_model(edit(language_model, tmp_path / "lm", num_hidden_layers=layers))


def test_an_unknown_tensor_of_a_language_model(language_model: Path, tmp_path: Path) -> None:
    folder = edit(language_model, tmp_path / "lm")
    weights = load_file(folder / "model.safetensors")
    # Older releases of Transformers stored the first; the others are other parts of a larger model.
    known = ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.a.weight", "v_head.summary.weight")
    save_file({**weights, **{name: torch.ones(2) for name in known}}, folder / "model.safetensors", {"format": "pt"})
    load_language_model(folder)
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(2)}
    save_file({**weights, **more}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LanguageModelError, match=r"e\.g\. 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load_language_model(folder)


def test_layers_that_predict_further_tokens_may_be_left_out() -> None:
    names = ["model.layers.4.eh_proj.weight", "model.layers.5.eh_proj.weight"]
    assert find_surplus(names, LlamaConfig(num_hidden_layers=4), ()) == names
    assert find_surplus(names, LlamaConfig(num_hidden_layers=4, num_nextn_predict_layers=1), ()) == names[1:]


def test_a_gguf_file_with_fewer_layers_than_its_weights(language_model: Path, tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "lm.gguf"
    write_gguf(language_model, file)
    held = count_gguf_elements(file)
    assert held == {x.name: int(x.n_elements) for x in gguf.GGUFReader(file).tensors}
    model = AutoModelForCausalLM.from_pretrained(language_model)
    assert sum(held.values()) == sum(x.numel() for x in model.parameters())
    load_language_model(file)
    data = file.read_bytes()
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    for layers, words in ((0, "num_hidden_layers must be"), (1, r"hold 27 tensors that .*'blk\.1\.attn_k\.weight'")):
        file.write_bytes(data[:at] + struct.pack("<I", layers) + data[at + 4 :])
        with pytest.raises(LanguageModelError, match=words):
            load_language_model(file)
