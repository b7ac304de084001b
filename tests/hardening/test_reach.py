"""Files that name other files and addresses: vlm follows none that leads where the user did not point."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file

import vlm_cli
from tests.support import ROOT, disk
from tests.support.disk import run
from vlm_cli.checkpoint.backbones import Backbone
from vlm_cli.checkpoint.inside import check_folder, read_index, resolve_inside
from vlm_cli.checkpoint.parts.openclip import published_address
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.schemas.tokenizer import check_tokenizer
from vlm_cli.errors import CheckpointError, VisionEncoderError
from vlm_cli.manifest import MANIFEST_FILE
from vlm_cli.modeling.towers import build_tower

OUTSIDE = ["/etc/passwd", "../secret", "a/../../secret", "a\\..\\..\\secret", "C:\\secret", "", "a\0b", None, 7]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """`lm`, `tower`, the full model `whole` and its delta."""
    path = tmp_path_factory.mktemp("reach")
    named = f"local-dir:{disk.tower(path / 'tower')}", str(disk.language_model(path / "lm"))
    disk.write(path / "whole", disk.composition(*named, "mlp", "language-stream"))
    assert run("export", path / "whole", path / "delta", "--format", "delta").exit_code == 0
    return path


@pytest.fixture
def own(built, tmp_path) -> SimpleNamespace:
    for name in ("lm", "whole", "delta"):
        shutil.copytree(built / name, tmp_path / name)
    return SimpleNamespace(folder=tmp_path, **{name: tmp_path / name for name in ("lm", "whole", "delta")})


def change_backbone(delta: Path, part: str, **changes: object) -> None:
    file = delta / "config.json"
    config = json.loads(file.read_text())
    config["backbones"][part].update(changes)
    file.write_text(json.dumps(config))


def shard(folder: Path, name: object, stem: str = "model") -> None:
    """Make a directory's index name `name` for every tensor."""
    names = load_file(folder / f"{stem}.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / f"{stem}.safetensors").unlink()
    (folder / MANIFEST_FILE).unlink(missing_ok=True)  # it would name the missing file first
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


# -- names inside a directory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(tmp_path, name):
    with pytest.raises(CheckpointError, match="may name only files inside of its directory"):
        resolve_inside(tmp_path, name, named_by="x.json")


def test_links_and_devices(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "in.bin").write_text("x")
    (folder / "link.bin").symlink_to("in.bin")
    (folder / "sub").mkdir()
    (folder / "sub/a.bin").write_text("x")
    for name in ("in.bin", "link.bin", "sub/a.bin", "missing.bin"):
        assert resolve_inside(folder, name, named_by="x.json") == folder / name
    check_folder(folder)
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(CheckpointError, match="a pipe, socket or device"):
        check_folder(folder)
    (folder / "pipe.json").unlink()
    for target in ("../secret", "/dev/zero", "../nothing"):
        (folder / "out.json").symlink_to(target)
        with pytest.raises(CheckpointError, match="is a link that leads out of its directory"):
            check_folder(folder)
        (folder / "out.json").unlink()


def test_the_links_of_the_hubs_cache(tmp_path):
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name/blobs").mkdir()
    (tmp_path / "models--org--name/blobs/1").write_text("x")
    (snapshot / "a.json").symlink_to("../../blobs/1")
    check_folder(snapshot)
    (snapshot / "b.json").symlink_to("../../../other")
    (tmp_path / "other").write_text("x")
    with pytest.raises(CheckpointError, match="leads out"):
        check_folder(snapshot)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["/dev/zero", "../lm/model.safetensors", "pipe"])
def test_no_loader_follows_an_index_that_leads_out(own, name):
    for folder, stem in ((own.whole, "model"), (own.lm, "model"), (own.delta, "delta")):
        os.mkfifo(folder / "pipe")
        shard(folder, name, stem)
    words = "pipe, socket or device" if name == "pipe" else "may name only files inside"
    for folder in (own.whole, own.delta):
        result = run("generate", "hi", "-m", folder)
        assert result.exit_code == 1 and words in result.stderr
    with pytest.raises(CheckpointError, match=words):
        PublishedCheckpoint.open(str(own.lm))
    result = run("build", own.folder / "out", "--config", own.whole / "composition.yaml", "--language-model", own.lm)
    assert result.exit_code == 1 and words in result.stderr


def test_an_index_of_the_directory_is_read(own):
    names = load_file(own.whole / "model.safetensors")
    (own.whole / "part.safetensors").write_bytes((own.whole / "model.safetensors").read_bytes())
    shard(own.whole, "part.safetensors")
    assert read_index(own.whole / "model.safetensors.index.json").keys() == names.keys()
    vlm_cli.load(str(own.whole))


def test_a_configuration_fetches_no_tower():
    for name in ("hf-hub:org/name", "local-dir:/etc", 7):
        with pytest.raises(VisionEncoderError, match="may only be a name that timm itself has"):
            build_tower({"embed_dim": 8, "vision_cfg": {"timm_model_name": name}})


#: Functions that join a folder and a name which is no constant, and why the name does not lead out.
JOINS = {
    "adapters.py:write_adapters": "names of parts, which are constants",
    "backbones.py:_fetch": "the last part of an address of OpenCLIP's table",
    "comparing.py:compare_with_llama_cpp": "names of files that vlm has just written",
    "downloads.py:downloaded": "a hash",
    "exporting.py:write_gguf": "letters, digits, dots and dashes of a directory's name",
    "inside.py:resolve_inside": "the rule itself",
    "language_model.py:edit": "names of a tokenizer's files, which vlm has just written",
    "language_model.py:forget_tokens": "the same",
    "language_models.py:_limited_size": "the file that the user named",
    "language_models.py:_check_uses_all": "the same",
    "language_models.py:_files_to_load": "`read_index` has checked it",
    "openclip.py:_download": "the last part of an address of OpenCLIP's table",
    "remote_code.py:write_code": "the name of a module that the user trusts",
    "checkpoint.py:_indexed_files": "`read_index` has checked it",
    "xgen_mm.py:_has_media_token": "constants",
    "gemma.py:_read_token": "constants",
    "announcing.py:_read": "constants",
    "preprocessing.py:_read_files": "constants",
    "reading.py:read_file": "constants",
    "run_record.py:copy_run_record": "names of files in the other directory",
}


def joins(source: str) -> set[str]:
    """The functions of a module that join a path and a name which is no constant."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                is_constant = isinstance(node.right, ast.Constant) or ast.unparse(node.right).isupper()
                is_path = re.search(r"folder|path|dir|place|out|location|root", ast.unparse(node.left), re.IGNORECASE)
                found |= {function.name} if is_path and not is_constant else set()
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("joinpath"):
                found.add(function.name)
    return found


def test_no_other_function_follows_a_name():
    files = sorted((ROOT / "vlm_cli/checkpoint").rglob("*.py"))
    found = {f"{path.name}:{name}" for path in files for name in joins(path.read_text(encoding="utf-8"))}
    assert found == set(JOINS)
    assert joins("def f(folder, index):\n    return folder / index['file']") == {"f"}
    assert joins("def f(folder):\n    return folder / 'config.json', folder / DELTA_FILE") == set()


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "spm_file"])
@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "../../../../../../../../../../../../etc/passwd"])
def test_a_tokenizer_reads_no_other_file(own, key, path):
    for folder in (own.lm, own.whole):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: path}))
        with pytest.raises(CheckpointError, match=rf"names the file '{path}' \({key}\)"):
            check_tokenizer(str(folder))


def test_a_path_of_another_machine_in_a_tokenizer_is_no_error(own):
    file = own.whole / "tokenizer_config.json"
    left = {"vocab_file": "/home/author/nowhere/vocab.json", "special_tokens_map_file": None, "merges_file": "m.txt"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **left}))
    check_tokenizer(str(own.whole))


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.pt", "http://example.com/a.pt", "file:///etc/passwd", "data:,x"])
def test_an_address_of_a_delta_is_not_fetched(own, url, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    change_backbone(own.delta, "vision_encoder", kind="url", location=url)
    result = run("generate", "hi", "-m", own.delta)
    assert result.exit_code == 1 and "not in OpenCLIP's table" in result.stderr
    assert "--backbone vision_encoder=PATH" in result.stderr


def test_the_table_of_openclip_is_no_strangers():
    address = published_address("ViT-B-32", "openai")
    assert address is not None and address.startswith("https://openaipublic.")
    assert published_address("ViT-B-32", None) is None and published_address("nothing", "openai") is None


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kind": "hub", "location": "/etc", "revision": "a" * 40}, "no id of a hub repository"),
        ({"kind": "hub", "location": "../etc", "revision": "a" * 40}, "no id of a hub repository"),
        ({"kind": "hub", "location": "org/name", "revision": "main"}, "no commit of 40"),
        ({"kind": "path", "location": "secret"}, "no absolute path"),
        ({"kind": "path", "location": "//server/share/a.pt"}, "no absolute path"),
        ({"kind": "path", "location": "/proc/self/environ"}, "no absolute path"),
        ({"kind": "path", "location": "/dev/zero"}, "no absolute path"),
        ({"kind": "package", "location": "http://example.com"}, "is an address"),
        ({"kind": "other", "location": "x"}, "none of hub, path, url, package"),
        ({"kind": "path", "location": 7}, "'location' is '7'"),
        ({"kind": "path", "location": "/a", "x": 1}, "'x' is unknown"),
        ({"kind": "path"}, "'location' is missing"),
        ({"kind": "path", "location": "/a", "bytes": -1}, "negative"),
        ("path", "it is no object"),
    ],
)
def test_records_of_backbones(record, words):
    with pytest.raises(CheckpointError, match=words):
        Backbone.read("d", "vision_encoder", {"name": "x", **record} if isinstance(record, dict) else record)


def test_the_user_names_a_backbone(own, built):
    change_backbone(own.delta, "vision_encoder", kind="url", location="http://127.0.0.1:1/a.pt")
    result = run("generate", "hi", "-m", own.delta, "-n", 2, "--backbone", f"vision_encoder={built / 'tower'}")
    assert result.exit_code == 0, result.stderr
    for value in ("tower", "fusion=x", "vision_encoder="):
        result = run("generate", "hi", "-m", own.delta, "--backbone", value)
        assert result.exit_code == 2 and "--backbone expects" in result.stderr


# -- images ------------------------------------------------------------------------------------------------------------


def test_the_media_root_confines_every_command(own, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "secret.png")
    Image.new("RGB", (32, 32), "blue").save(root / "in.png")
    (root / "link.png").symlink_to("../secret.png")
    model = ["-m", own.whole, "-n", 1, "--media-root", root]
    for source in (tmp_path / "secret.png", root / "link.png", root / "../secret.png", "/etc/nothing"):
        result = run("generate", f"<image:{source}>A", *model)
        assert result.exit_code == 1 and "leads out of the media root" in result.stderr
    assert run("generate", f"<image:{root / 'in.png'}>A", *model).exit_code == 0
    rows = [{"prompt": f"<image:{x}>A", "completion": " B."} for x in ("in.png", "link.png", "../secret.png")]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    assert run("batch", data, *model, "-o", out).exit_code == 1
    errors = ["error" in json.loads(line) for line in out.read_text().splitlines()]
    assert errors == [False, True, True]
    for command in (("eval", own.whole, "-d", data), ("train", own.whole, "-d", data, "-o", tmp_path / "trained")):
        result = run(*command, "--media-root", root)
        assert result.exit_code == 1 and result.stderr.count("leads out of the media root") == 2
