"""The hub: models, language models and towers by name; pushing; a pinned revision; offline from the cache.

Each test reads what two processes found out, one with a hub (`hub_server.py`) and then one without.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support import ROOT, disk
from tests.support.hub_server import serving

pytestmark = pytest.mark.matrix  # processes with and without the network, for half a minute


BOTH = """
import json, sys, warnings
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.support.disk import run
import vlm_cli
from vlm_cli import VLM

torch.set_num_threads(1)
given = json.loads(sys.argv[1])
found = {}

@torch.no_grad()
def logits(model, processor):
    photo = Image.new("RGB", (32, 32), "red")
    return model.eval()(**processor(text="The <image> cat", images=[photo])).logits

def agree(name, pair, other):
    found[name] = torch.equal(logits(*pair), logits(*other))

def command(name, *words):
    result = run(*words)
    found[name] = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}

first, second = (vlm_cli.load(given[x]) for x in ("first", "second"))
"""

ONLINE = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from huggingface_hub import HfApi

agree("load", vlm_cli.load("org/vlm"), second)
agree("another commit", vlm_cli.load("org/vlm", revision="v1"), second)
agree("revision", vlm_cli.load("org/vlm", revision="v1"), first)
agree("from_pretrained", (VLM.from_pretrained("org/vlm"), first[1]), second)
agree("from_pretrained of a revision", (VLM.from_pretrained("org/vlm", revision="v1"), first[1]), first)
auto = AutoModelForImageTextToText.from_pretrained("org/vlm"), AutoProcessor.from_pretrained("org/vlm")
agree("auto classes", auto, second)
found["auto config"] = type(AutoConfig.from_pretrained("org/vlm")).__name__
words = ["generate", "<image>The", "-i", given["photo"], "-n", 4, "--json"]
command("generate", *words, "-m", "org/vlm")
command("generate of a directory", *words, "-m", given["second"])
for repository in ("org/edited", "org/changed"):
    command(repository, "count-params", repository)
    command(f"{repository} --verify", "generate", "The", "-m", repository, "-n", 2, "--verify")
command("org/vlm --verify", "generate", "The", "-m", "org/vlm", "-n", 2, "--verify")
command("no such model", "generate", "hi", "-m", "org/nothing")
command("no such revision", "generate", "hi", "-m", "org/vlm", "--revision", "v9")

named = ["--config", given["composition"], "--language-model", "org/lm", "--vision-encoder", "hf-hub:org/tower"]
command("build", "build", "whole", *named, "--quiet")
local, remote = (load_file(Path(x) / "model.safetensors") for x in (given["built"], "whole"))
found["built weights"] = all(torch.equal(local[k], x) for k, x in remote.items()) and local.keys() == remote.keys()
command("build a delta", "build", "delta", *named, "--delta")
found["backbones"] = json.loads(Path("delta/config.json").read_text())["backbones"]
agree("delta", vlm_cli.load("delta"), vlm_cli.load("whole"))
HfApi().upload_folder(repo_id="org/lm", folder_path=given["other lm"])
command("build after the language model moved on", "build", "moved", *named, "--quiet")
agree("the language model moved on", vlm_cli.load("moved"), vlm_cli.load("whole"))
agree("delta after the language model moved on", vlm_cli.load("delta"), vlm_cli.load("whole"))

model, processor = first
model.push_to_hub("org/pushed")
processor.push_to_hub("org/pushed")
agree("pushed", vlm_cli.load("org/pushed"), first)
HfApi().create_repo("org/delta")
HfApi().upload_folder(repo_id="org/delta", folder_path="delta")
agree("pushed delta", vlm_cli.load("org/delta"), vlm_cli.load("whole"))
command("push", "push", "whole", "org/whole", "--license", "mit")
command("generate from what was pushed", *words, "-m", "org/whole")
command("generate from what was built", *words, "-m", "whole")
command("eval of what was pushed", "eval", "org/whole", "--data", given["questions"], "--json")
command("push a delta", "push", "delta", "org/pushed-delta")
command("build from a pushed delta", "build", "back2", "--from", "org/pushed-delta")
agree("built from a pushed delta", vlm_cli.load("back2"), vlm_cli.load("whole"))
command("inspect a pushed delta", "inspect", "org/delta", "--json")
print(json.dumps(found))
"""

OFFLINE = """
agree("load", vlm_cli.load("org/vlm"), second)
agree("revision", vlm_cli.load("org/vlm", revision="v1"), first)
agree("from_pretrained", (VLM.from_pretrained("org/vlm"), first[1]), second)
agree("pushed", vlm_cli.load("org/pushed"), first)
agree("delta", vlm_cli.load("delta"), vlm_cli.load("whole"))
agree("pushed delta", vlm_cli.load("org/delta"), vlm_cli.load("whole"))
command("generate", "generate", "<image>The", "-i", given["photo"], "-m", "org/vlm", "-n", 4, "--json")
named = ["--config", given["composition"], "--language-model", "org/lm", "--vision-encoder", "hf-hub:org/tower"]
command("build", "build", "again", *named, "--quiet")
agree("built", vlm_cli.load("again"), vlm_cli.load("moved"))
command("never fetched", "generate", "hi", "-m", "org/nothing")
import shutil
for folder in Path(given["cache"]).rglob("models--org--tower"):
    shutil.rmtree(folder)
command("delta without its tower", "generate", "hi", "-m", "delta")
print(json.dumps(found))
"""


def process(script: str, given: dict[str, str], folder: Path, **environment: str) -> dict[str, Any]:
    """What a process finds out."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "HOME": str(folder), "HF_HOME": given["cache"], "HF_HUB_DISABLE_XET": "1"}
    own |= {"OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", BOTH + script, json.dumps(given)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def rewritten(folder: Path, name: str, file: str) -> Path:
    """A copy of a model in which a byte of one file is another one."""
    target = shutil.copytree(folder / "second", folder / name)
    data = bytearray((target / file).read_bytes())
    data[-1:] = b" " if file.endswith(".json") else bytes([data[-1] ^ 1])
    (target / file).write_bytes(data)
    return target


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("hub")
    tower, lm = disk.tower(folder / "tower"), disk.language_model(folder / "lm")
    other = disk.language_model(folder / "other-lm")
    weights = load_file(other / "model.safetensors")
    save_file({name: x + 0.01 for name, x in weights.items()}, other / "model.safetensors", {"format": "pt"})
    parts = disk.composition(f"local-dir:{tower}", str(lm), "mlp", "language-stream")
    given = {"cache": str(folder / "cache"), "other lm": str(other), "photo": str(folder / "photo.png")}
    shutil.copy(ROOT / "examples/images/two.png", given["photo"])
    question = {"prompt": "<image:photo.png>How many?", "completion": " two"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    given["questions"] = str(folder / "questions.jsonl")
    for seed, name in enumerate(("first", "second")):
        given[name] = str(disk.write(folder / name, parts, seed=seed))
    assert disk.run("build", folder / "built", "--config", folder / "first/composition.yaml", "-q").exit_code == 0
    given |= {"built": str(folder / "built"), "composition": str(folder / "first/composition.yaml")}
    with serving() as hub:
        commits = {"lm": hub.add("org/lm", lm), "tower": hub.add("org/tower", tower)}
        hub.add("org/vlm", folder / "first", "v1")
        hub.add("org/vlm", folder / "second")
        hub.add("org/edited", rewritten(folder, "edited", "generation_config.json"))
        hub.add("org/changed", rewritten(folder, "changed", "model.safetensors"))
        online = process(ONLINE, given, folder, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0")
    offline = process(OFFLINE, given, folder, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
    return SimpleNamespace(online=online, offline=offline, hub=hub, commits=commits)


LOADED = ("load", "revision", "from_pretrained", "from_pretrained of a revision", "auto classes", "built weights")
LOADED += ("built from a pushed delta",)
LOADED += ("delta", "delta after the language model moved on", "pushed", "pushed delta")


@pytest.mark.parametrize("name", LOADED)
def test_by_name(found, name):
    assert found.online[name] is True
    assert found.online["auto config"] == "VLMConfig"


@pytest.mark.parametrize("name", ["another commit", "the language model moved on"])
def test_another_commit_is_another_model(found, name):
    assert found.online[name] is False


@pytest.mark.parametrize("name", ["load", "revision", "from_pretrained", "pushed", "delta", "pushed delta", "built"])
def test_offline_from_the_cache(found, name):
    assert found.offline[name] is True


def test_commands(found):
    for name in ("build", "build a delta", "inspect a pushed delta"):
        assert found.online[name]["code"] == 0, found.online[name]["stderr"]
    answers = [found.online["generate"], found.online["generate of a directory"], found.offline["generate"]]
    texts = [json.loads(answer["stdout"])["text"] for answer in answers]
    assert texts[0] == texts[1] == texts[2] and texts[0]


def test_what_vlm_push_sent_is_used_by_its_name(found):
    for name in ("push", "eval of what was pushed", "push a delta", "build from a pushed delta"):
        assert found.online[name]["code"] == 0, found.online[name]["stderr"]
    texts = [json.loads(found.online[f"generate from what was {x}"]["stdout"])["text"] for x in ("pushed", "built")]
    assert texts[0] == texts[1] and texts[0]
    assert json.loads(found.online["eval of what was pushed"]["stdout"])["model"] == "org/whole"
    card = found.hub.repositories["org/whole"].newest["README.md"].decode()
    assert "license: mit" in card and "- org/lm" in card and "- org/tower" in card
    assert "vlm build OUT --from delta" in found.online["push a delta"]["stderr"]
    assert "differ" not in found.online["build from a pushed delta"]["stderr"]  # files that were not fetched


def test_a_delta_is_pinned_at_commits(found):
    backbones, commits = found.online["backbones"], found.commits
    lm, tower = backbones["language_model"], backbones["vision_encoder"]
    assert (lm["kind"], lm["location"], lm["revision"]) == ("hub", "org/lm", commits["lm"])
    assert (tower["kind"], tower["location"], tower["revision"]) == ("hub", "org/tower", commits["tower"])
    assert tower["file"] == "open_clip_model.safetensors"


def test_what_is_pushed_is_a_directory_that_runs(found):
    repository = found.hub.repositories["org/pushed"]
    files = repository.commits[repository.names["main"]]
    assert files.keys() >= {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert files["model.safetensors"] in found.hub.large.values()
    assert not [x for x in found.hub.unknown if "org/pushed" in x and not x.startswith("HEAD")]


def test_files_of_the_hub_are_compared_with_their_manifest(found):
    for words in ("org/edited", "org/edited --verify", "org/vlm --verify"):
        answer = found.online[words]
        assert answer["code"] == 0
        assert ("generation_config.json of 'org/edited' differs" in answer["stderr"]) == ("edited" in words)
    answer = found.online["org/changed --verify"]
    assert answer["code"] == 1 and "'org/changed' does not hold the weights that it was written" in answer["stderr"]
    assert "model.safetensors has another SHA-256 hash" in answer["stderr"]


def test_what_is_not_there_is_an_error(found):
    for answer in (found.online["no such model"], found.online["no such revision"], found.offline["never fetched"]):
        assert answer["code"] == 1 and "Error: cannot load 'org/" in answer["stderr"] and not answer["stdout"]


def test_a_backbone_that_is_not_in_the_cache_is_named(found):
    answer = found.offline["delta without its tower"]
    assert answer["code"] == 1
    commit = found.commits["tower"]
    for words in (
        "its vision encoder",
        f"'org/tower' at commit {commit}",
        f"hf download org/tower --revision {commit}",
    ):
        assert words in answer["stderr"]
