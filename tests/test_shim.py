"""`vlm_shim.py`: Transformers opens a directory in a process that knows nothing of vlm, and vlm never runs the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import dynamic_module_utils

from tests.support import ROOT, disk
from tests.support.command import vlm
from tests.support.hub_server import serving
from vlm_cli import VLM, VLMConfig, VLMProcessor, load
from vlm_cli.errors import UntrustedCodeError
from vlm_cli.shim import CONFIG_CLASSES, PROCESSOR_CLASSES, SHIM_FILE, is_shim


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and a language model, and a VLM of the two as `vlm build` writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("parts")
    tower, lm = disk.tower(folder / "tower"), disk.language_model(folder / "lm")
    disk.write(folder / "vlm", disk.composition(f"local-dir:{tower}", str(lm), "mlp", "language-stream"))
    return folder


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def has_shim(folder: Path) -> bool:
    """Whether a directory has the file; its configuration and its manifest must agree."""
    found = (folder / SHIM_FILE).is_file()
    assert read(folder / "config.json").get("auto_map") == (CONFIG_CLASSES if found else None)
    assert (SHIM_FILE in read(folder / "vlm_manifest.json")["files"]) == found
    assert read(folder / "processor_config.json")["auto_map"] == PROCESSOR_CLASSES
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["build", "delta", "export", "train"])
def test_every_command_that_writes_a_model_writes_the_file_unless_told_otherwise(parts, tmp_path, name):
    model, config = str(parts / "vlm"), str(parts / "vlm" / "composition.yaml")
    records = tmp_path / "records.jsonl"
    records.write_text('{"prompt": "a", "completion": " b"}\n')
    commands = {
        "build": ["build", "--config", config],
        "delta": ["build", "--config", config, "--delta"],
        "export": ["export", model, "--format", "delta"],
        "train": ["train", model, "--data", str(records), "--max-steps", "1", "--output"],
    }
    for flags in ([], ["--no-shim"]):
        out = tmp_path / f"out{len(flags)}"
        code, printed = vlm([*commands[name], str(out), *flags, "--quiet"])
        assert code == 0, printed
        assert has_shim(out) == (not flags)
        load(str(out))


def test_what_python_writes_has_the_file(parts, tmp_path):
    model, processor = load(str(parts / "vlm"))
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert has_shim(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {SHIM_FILE}
    for kind in (VLM, VLMConfig, VLMProcessor):  # as Transformers does when the file names the class
        kind.register_for_auto_class()
    model.save_pretrained(tmp_path / "after")
    processor.save_pretrained(tmp_path / "after")
    assert {path.name for path in (tmp_path / "after").glob("*.py")} == {SHIM_FILE}


@pytest.mark.parametrize(
    ("auto_map", "expected"),
    [
        (CONFIG_CLASSES, True),
        (PROCESSOR_CLASSES, True),
        ({}, True),
        (None, False),
        ([*CONFIG_CLASSES.values()], False),
        ({**CONFIG_CLASSES, "AutoTokenizer": "vlm_shim.Thing"}, False),
        ({"AutoConfig": "org/name--vlm_shim.VLMConfig"}, False),
        ({"AutoConfig": ["vlm_shim.VLMConfig"]}, False),
    ],
)
def test_only_the_very_names_are_those_of_the_file(auto_map, expected):
    assert is_shim(auto_map) is expected


# -- vlm and the file --------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Path, Path]]:
    """Makes a directory whose file is another program, and the name of what that program leaves behind."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, marker = Path(shutil.copytree(parts / "vlm", tmp_path / "vlm")), tmp_path / "code ran"
    (folder / SHIM_FILE).write_text(f"open({str(marker)!r}, 'w').close()\n")
    return folder, marker


@pytest.mark.parametrize("trust", [[], ["--trust-remote-code"]])
@pytest.mark.parametrize("command", ["generate", "inspect", "doctor", "count-params", "export"])
@pytest.mark.sample(3)
def test_vlm_never_runs_the_file(marked, tmp_path, command, trust):
    folder, marker = marked
    words = {
        "generate": ["generate", "a", "-m", folder, "-n", 1],
        "export": ["export", folder, tmp_path / "out", "--format", "language-model"],
    }.get(command, [command, folder])
    code, printed = vlm([*map(str, words), *trust])
    assert code == 0, printed
    assert not marker.exists()
    assert f"{SHIM_FILE} of {str(folder)!r} differs from what was written" in " ".join(printed.split())


@pytest.mark.parametrize("trust", [False, True])
def test_our_classes_never_run_the_file(marked, trust):
    folder, marker = str(marked[0]), marked[1]
    load(folder, trust_remote_code=trust)
    VLM.from_pretrained(folder, trust_remote_code=trust)
    VLMProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert not marker.exists()


def test_other_names_in_its_place_are_refused(marked):
    folder, marker = marked
    config = read(folder / "config.json")
    config["auto_map"]["AutoTokenizer"] = "vlm_shim.Thing"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UntrustedCodeError, match=re.escape("vlm_shim.Thing (auto_map)")):
        load(str(folder))
    assert not marker.exists()


# -- other programs ----------------------------------------------------------------------------------------------------

FOREIGN = """
import json, os, sys
given = json.loads(sys.argv[1])

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vlm_cli":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if given["absent"]:
    sys.meta_path.insert(0, Absent())
import torch, transformers

def attempt(name, model, **how):
    try:
        return getattr(transformers, name).from_pretrained(model, **how)
    except Exception as error:
        return error

assert "vlm_cli" not in sys.modules
found = [attempt(name, model, **how) for name, model, how in given["attempts"]]
said = {"found": [[type(x).__name__, str(x) if isinstance(x, Exception) else ""] for x in found]}
if given["uses"]:
    from PIL import Image
    config, tokenizer, processor, model, _ = found
    with torch.no_grad():
        inputs = processor(text="The <image> cat", images=[Image.new("RGB", (32, 32), "red")])
        said["logits"] = model.eval()(**inputs).logits.tolist()
    assert processor.tokenizer("The cat")["input_ids"] == tokenizer("The cat")["input_ids"]
    model.save_pretrained("again")
    processor.save_pretrained("again")
    said["written"] = sorted(x for x in os.listdir("again") if x.endswith(".py"))
print(json.dumps(said))
"""
NAMES = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
TRUST = {"trust_remote_code": True}


def process(folder: Path, *attempts: Any, absent=False, uses=False, stdin="", **environment) -> dict[str, Any]:
    """What a process says that imports Transformers alone, and attempts to load objects of classes and directories."""
    given = {"attempts": [(name, str(model), how) for name, model, how in attempts], "absent": absent, "uses": uses}
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, json.dumps(given)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **own},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index('{"found"') :])


@pytest.mark.matrix
@pytest.mark.parametrize("place", ["directory", "hub"])
def test_a_process_that_knows_nothing_of_vlm_opens_a_directory(parts, tmp_path, place):
    if place == "hub":
        with serving() as hub:
            hub.add("org/vlm", parts / "vlm")
            network = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"}
            said = process(tmp_path, *((name, "org/vlm", TRUST) for name in NAMES), uses=True, **network)
    else:
        said = process(tmp_path, *((name, parts / "vlm", TRUST) for name in NAMES), uses=True)
    kinds = [kind for kind, _ in said["found"]]
    assert kinds == ["VLMConfig", "TokenizersBackend", "VLMProcessor", *["VLMWithLanguageStream"] * 2], said["found"]
    model, processor = load(str(parts / "vlm"))
    with torch.no_grad():
        wanted, other = (
            model(**processor(text="The <image> cat", images=[Image.new("RGB", (32, 32), colour)])).logits
            for colour in ("red", "blue")
        )
    logits = torch.tensor(said["logits"])
    torch.testing.assert_close(logits, wanted)
    assert not torch.allclose(logits, other)
    assert said["written"] == [SHIM_FILE] and has_shim(tmp_path / "again")


@pytest.mark.matrix
def test_without_the_package_the_file_says_what_to_install(parts, tmp_path):
    for kind, words in process(tmp_path, *((x, parts / "vlm", TRUST) for x in NAMES), absent=True)["found"]:
        assert kind == "ImportError" and words.endswith("it is not installed: pip install vlm-cli"), words


@pytest.mark.matrix
def test_no_processor_is_a_plain_tokenizer(parts, tmp_path):
    bare = Path(shutil.copytree(parts / "vlm", tmp_path / "bare"))
    (bare / SHIM_FILE).unlink()
    config = {key: x for key, x in read(bare / "config.json").items() if key != "auto_map"}
    (bare / "config.json").write_text(json.dumps(config))
    unnamed = Path(shutil.copytree(bare, tmp_path / "unnamed"))
    settings = {key: x for key, x in read(bare / "processor_config.json").items() if key != "auto_map"}
    (unnamed / "processor_config.json").write_text(json.dumps(settings))
    tried = [
        (parts / "vlm", {}),
        (parts / "vlm", {"trust_remote_code": False}),
        (bare, {}),
        (bare, TRUST),
        (unnamed, TRUST),
    ]
    *refused, missing, twin = process(tmp_path, *(("AutoProcessor", *x) for x in tried), stdin="n\n")["found"]
    for kind, words in refused:
        assert kind == "ValueError" and "trust_remote_code=True" in words, words
    assert missing[0] == "OSError" and "vlm_shim.py" in missing[1]
    assert twin[0] == "TokenizersBackend"  # what Transformers does where processor_config.json names no class
