"""Files that ask for code: none of it runs without the flag, and no question takes a piped "y" for its answer."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, dynamic_module_utils, pipeline

import vlm_cli
from tests.support import ROOT, disk
from tests.support.command import Ended, run_in_copy, vlm
from tests.support.grid import grid
from tests.support.hub_server import serving
from vlm_cli import VLM, VLMProcessor
from vlm_cli.checkpoint.torch_files import describe_load_error, read_torch_file
from vlm_cli.cli.app import main
from vlm_cli.errors import CheckpointError, UntrustedCodeError
from vlm_cli.quiet import silence_libraries
from vlm_cli.training.checkpoints import reading

#: Runs as `import evil` or as a pickle; leaves a file behind.
EVIL = """
open({marker!r}, "w").close()

class Thing:
    pass
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower, a language model, a VLM of the two, a picture, and rows; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    tower, lm = disk.tower(folder / "tower"), disk.language_model(folder / "lm")
    disk.write(folder / "vlm", disk.composition(f"local-dir:{tower}", str(lm), "mlp", "language-stream"))
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    record = {"prompt": "<image>What colour?", "images": ["red.png"], "completion": " red"}
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "questions.jsonl").write_text(json.dumps({**record, "answer": "red", "kind": "colour"}) + "\n")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "<image>y", "images": ["red.png"]}) + "\n")
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when code from a file runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "code ran"


def edit(file: Path, **settings: Any) -> None:
    """Change settings of a JSON file; None removes one."""
    data = json.loads(file.read_text()) if file.is_file() else {}
    data |= settings
    file.write_text(json.dumps({key: x for key, x in data.items() if x is not None}))


def edit_text_config(folder: Path, **settings: Any) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | settings)


OWN_TYPE = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Thing", "AutoModelForCausalLM": "evil.Thing"}}
IMAGE_PROCESSOR = {"image_processor_type": "Thing", "auto_map": {"AutoImageProcessor": "evil.Thing"}}

Change = Callable[[Path], Any]


def editing(name: str, **settings: Any) -> Change:
    return lambda folder: edit(folder / name, **settings)


def both(first: Change, second: Change) -> Change:
    return lambda folder: (first(folder), second(folder))


def tokenizer(auto_map: Any, tokenizer_class: str | None = None) -> Change:
    return editing("tokenizer_config.json", tokenizer_class=tokenizer_class, auto_map=auto_map)


TOKENIZER = {"AutoTokenizer": ["evil.Thing", None]}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "megatron_core": "evil"}
ASKS = "asks for evil.Thing (auto_map)"

#: What is changed in the directory of a VLM -> words of the error.
VLM_FILES: dict[str, tuple[Change, str]] = {
    "tokenizer": (tokenizer(TOKENIZER, "Thing"), f"tokenizer_config.json {ASKS}"),
    "tokenizer without a class": (tokenizer({"AutoTokenizer": [None, "evil.Thing"]}), f"tokenizer_config.json {ASKS}"),
    "tokenizer, old style": (tokenizer(["evil.Thing", None]), f"tokenizer_config.json {ASKS}"),
    "tokenizer of another repository": (
        tokenizer({"AutoTokenizer": ["org/x--evil.Thing", None]}, "Thing"),
        "tokenizer_config.json asks for org/x--evil.Thing (auto_map)",
    ),
    "tokenizer in config.json": (
        both(editing("config.json", auto_map=TOKENIZER), tokenizer(None)),
        f"config.json {ASKS}",
    ),
    "processor": (
        editing("processor_config.json", processor_class=None, auto_map={"AutoProcessor": "evil.Thing"}),
        f"processor_config.json {ASKS}",
    ),
    "image processor": (
        editing("processor_config.json", image_processor=IMAGE_PROCESSOR),
        f"processor_config.json {ASKS}",
    ),
    "image processor in a file of its own": (
        both(
            editing("processor_config.json", image_processor=None),
            editing("preprocessor_config.json", **IMAGE_PROCESSOR),
        ),
        f"preprocessor_config.json {ASKS}",
    ),
    "configuration": (
        editing("config.json", auto_map={"AutoConfig": "evil.Thing", "AutoModelForImageTextToText": "evil.Thing"}),
        f"config.json {ASKS}",
    ),
    "language model": (lambda x: edit_text_config(x, **OWN_TYPE), f"config.json {ASKS}"),
    "kernel": (
        lambda x: edit_text_config(x, attn_implementation="org/kernel"),
        "config.json asks for org/kernel (attn_implementation)",
    ),
    "generation": (
        editing("generation_config.json", custom_generate="org/generate"),
        "generation_config.json asks for org/generate (custom_generate)",
    ),
    "adapter": (editing("adapter_config.json", **ADAPTER), "adapter_config.json asks for an adapter of 'org/base'"),
}


@pytest.fixture
def hostile(made: Path, tmp_path: Path, marker: Path) -> Callable[[str, Change], Path]:
    """Copies one of the directories, puts the module beside its files, and changes them."""

    def copy(part: str, change: Change) -> Path:
        folder = Path(shutil.copytree(made / part, tmp_path / part))
        for place in (folder, folder / "custom_generate"):
            place.mkdir(exist_ok=True)
            for name in ("evil.py", "generate.py"):
                (place / name).write_text(EVIL.format(marker=str(marker)))
        change(folder)
        return folder

    return copy


def words_of(command: str, model: Path, made: Path, out: Path) -> list[str]:
    """A command line that loads a VLM."""
    words = {
        "generate": ["generate", "y", "-m", model, "-n", 1],
        "generate, prompt on stdin": ["generate", "-", "-m", model, "-n", 1],
        "chat": ["chat", model, "-n", 1],
        "batch": ["batch", made / "rows.jsonl", "-m", model, "-o", out, "-n", 1],
        "batch, rows on stdin": ["batch", "-", "-m", model, "-o", out, "-n", 1],
        "inspect": ["inspect", model],
        "count-params": ["count-params", model],
        "doctor": ["doctor", model],
        "train": ["train", model, "--data", made / "records.jsonl", "--output", out, "--max-steps", 1],
        "eval": ["eval", model, "--data", made / "questions.jsonl", "-n", 1],
        "export": ["export", model, out, "--format", "language-model"],
    }
    return [str(word) for word in words[command]]


COMMANDS = ("generate", "generate, prompt on stdin", "chat", "batch", "batch, rows on stdin", "inspect", "count-params")
COMMANDS += ("doctor", "train", "eval", "export")


def in_a_pipeline(name: str) -> object:
    return pipeline("image-text-to-text", model=name)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", VLM_FILES)
def test_no_code_from_a_directory(hostile, made, marker, tmp_path, name, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    change, words = VLM_FILES[name]
    folder = hostile("vlm", change)
    code, printed = vlm(words_of("generate", folder, made, tmp_path / "out"), stdin=b"y\ny\ny\n")
    assert not marker.exists() and code == 1
    assert words in printed and "If you trust it, add --trust-remote-code" in printed
    assert "[y/N]" not in printed and "Traceback" not in printed and printed.count("Error:") == 1
    for load in (vlm_cli.load, VLM.from_pretrained, VLMProcessor.from_pretrained, in_a_pipeline):
        with pytest.raises((UntrustedCodeError, ValueError)):
            load(str(folder))
        assert not marker.exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_in_any_command(hostile, made, marker, tmp_path, command):
    change, words = VLM_FILES["tokenizer"]
    model = hostile("vlm", change)
    code, printed = vlm(words_of(command, model, made, tmp_path / "out"), stdin=b"y\ny\ny\n")
    assert not marker.exists() and code == 1, printed
    assert words in printed and "add --trust-remote-code" in printed and "[y/N]" not in printed


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["generate", "batch, rows on stdin", "inspect", "train", "eval", "export"])
def test_the_commands_work_without_the_change(hostile, made, tmp_path, command):
    model = hostile("vlm", lambda folder: None)
    code, printed = vlm(words_of(command, model, made, tmp_path / "out"), stdin=b'{"prompt": "y"}\n')
    assert code == 0, printed


def test_transformers_takes_a_piped_yes_for_the_answer(hostile, marker, monkeypatch):
    folder = hostile("vlm", VLM_FILES["tokenizer"][0])
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with suppress(Exception):  # the module has no tokenizer, but by then it has run
        AutoTokenizer.from_pretrained(folder)
    assert marker.exists()


def test_code_runs_with_the_flag(hostile, made, marker, tmp_path):
    model = hostile("vlm", VLM_FILES["tokenizer"][0])
    words = words_of("generate", model, made, tmp_path / "out")
    vlm([*words, "--trust-remote-code"])
    assert marker.exists()


def test_names_of_code_that_is_not_needed_are_no_error(hostile, made, marker, tmp_path):
    def change(folder: Path) -> None:
        edit(folder / "tokenizer_config.json", auto_map=TOKENIZER)
        edit_text_config(folder, auto_map={"AutoConfig": "evil.Thing", "AutoModelForCausalLM": "evil.Thing"})

    code, printed = vlm(words_of("generate", hostile("vlm", change), made, tmp_path), stdin=b"y\n")
    assert code == 0 and not marker.exists(), printed


# -- parts -------------------------------------------------------------------------------------------------------------


LM_FILES: dict[str, tuple[Change, str]] = {
    "configuration": (editing("config.json", **OWN_TYPE), f"config.json {ASKS}"),
    "tokenizer": VLM_FILES["tokenizer"],
    "tokenizer of another repository": VLM_FILES["tokenizer of another repository"],
    "adapter": VLM_FILES["adapter"],
    "kernel": (
        editing("config.json", attn_implementation="org/kernel"),
        "config.json asks for org/kernel (attn_implementation)",
    ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LM_FILES)
def test_no_code_from_a_language_model(hostile, made, marker, tmp_path, name):
    change, words = LM_FILES[name]
    lm = hostile("lm", change)
    parts = ["--family", "llava", "--vision-encoder", f"local-dir:{made / 'tower'}", "--language-model", str(lm)]
    code, printed = vlm(["build", str(tmp_path / "out"), *parts], stdin=b"y\ny\n")
    assert not marker.exists() and code == 1, printed
    assert words in printed and "If you trust it, add --trust-remote-code" in printed and "[y/N]" not in printed
    assert not (tmp_path / "out").exists()


def test_no_code_from_a_tokenizer(hostile, made, marker, tmp_path):
    tokenizer = hostile("lm", VLM_FILES["tokenizer"][0])
    parts = ["--family", "llava", "--vision-encoder", f"local-dir:{made / 'tower'}", "--language-model", made / "lm"]
    words = ["build", tmp_path / "out", *parts, "--set", f"language_model.tokenizer={tokenizer}"]
    code, printed = vlm([str(word) for word in words], stdin=b"y\ny\n")
    assert not marker.exists() and code == 1 and "asks for evil.Thing (auto_map)" in printed


class Run:
    """Pickles as a call of `open`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def write_weights(file: Path, marker: Path, kind: str) -> None:
    """Write a weight file with code inside."""
    if kind == "zip":
        torch.save({"visual.x": Run(marker)}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"visual.x": Run(marker)}))
    elif kind == "legacy":
        torch.save({"visual.x": Run(marker)}, file, _use_new_zipfile_serialization=False)
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    else:
        np.savez(file, x=np.array([Run(marker)], dtype=object), allow_pickle=True)


ADVICE = ("weights_only", "allow_pickle", "trust the source", "trusted source", "pickle.load", "file an issue")


@pytest.mark.sample(2)
@grid(kind=["zip", "pickle", "legacy", "script", "npz"], place=["encoder", "weights", "language model", "local-dir"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_code_from_a_weight_file(hostile, made, marker, tmp_path, kind, place):
    lm, tower = hostile("lm", lambda folder: None), hostile("tower", lambda folder: None)
    parts: list[Any] = ["--family", "llava", "--language-model", lm, "--vision-encoder", f"local-dir:{tower}"]
    file = tmp_path / ("weights.npz" if kind == "npz" else "weights.bin")
    if place == "encoder":
        parts += ["--set", f"vision_encoder.pretrained={file}"]
    elif place == "weights":
        parts += ["--weights", file]
    elif place == "language model":
        (lm / "model.safetensors").unlink()
        file = lm / "pytorch_model.bin"
    else:
        (tower / "open_clip_model.safetensors").unlink()
        file = tower / "open_clip_pytorch_model.bin"
    write_weights(file if kind != "npz" else file.with_suffix(".npz"), marker, kind)
    if kind == "npz" and file.suffix == ".bin":
        file.with_suffix(".npz").rename(file)
    code, printed = vlm([str(word) for word in ["build", tmp_path / "out", *parts]], stdin=b"y\n")
    assert not marker.exists() and code == 1, printed
    assert not [words for words in ADVICE if words in printed] and "Error:" in printed


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy"])
def test_no_code_and_no_advice_from_a_checkpoint_of_a_training_run(tmp_path, marker, kind):
    """Transformers' Trainer reads optimizer.pt and its like with `torch.load`, and passes its advice on."""
    write_weights(tmp_path / "optimizer.pt", marker, kind)
    with pytest.raises(CheckpointError, match=r"cannot be read: .* Delete its folder") as caught, reading(tmp_path):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not marker.exists() and not [words for words in ADVICE if words in str(caught.value)]


def test_the_pickle_works(tmp_path, marker):
    write_weights(tmp_path / "x.pt", marker, "zip")
    with pytest.raises(pickle.UnpicklingError) as caught:
        read_torch_file(tmp_path / "x.pt")
    assert not marker.exists() and "which is code and no tensor" in describe_load_error(caught.value)
    torch.load(tmp_path / "x.pt", weights_only=False)["visual.x"].close()
    assert marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.torch.jit")
def test_no_advice_of_torch_reaches_the_terminal(tmp_path, marker, kind):
    write_weights(tmp_path / "x.pt", marker, kind)
    for silence, count in ((lambda: None, 1), (silence_libraries, 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            silence()
            with pytest.raises((pickle.UnpicklingError, RuntimeError)):
                read_torch_file(tmp_path / "x.pt")
        assert len(told) == count


def test_no_model_of_transformers_for_the_text_of_a_tower(hostile, made, marker, tmp_path):
    """OpenCLIP would load the configuration that `hf_model_name` names, and ask whether to run its code."""
    lm = hostile("lm", lambda folder: edit(folder / "config.json", **OWN_TYPE))
    text = {**disk.TOWER["text_cfg"], "hf_model_name": str(lm)}
    (tmp_path / "tower.json").write_text(json.dumps({**disk.TOWER, "text_cfg": text}))
    torch.save({"image_encoder.x": torch.zeros(1)}, tmp_path / "weights.pt")
    parts = ["--family", "llava", "--language-model", made / "lm", "--vision-encoder", tmp_path / "tower.json"]
    words = ["build", tmp_path / "out", *parts, "--set", f"vision_encoder.pretrained={tmp_path / 'weights.pt'}"]
    code, printed = vlm([str(word) for word in words], stdin=b"y\ny\n")
    assert not marker.exists() and code == 1 and "tensors of the vision tower" in printed


# -- in a process of its own -------------------------------------------------------------------------------------------


def surroundings(folder: Path, **environment: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "hf")}
    return own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none", **environment}


def process(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `vlm` with "y" on stdin."""
    own, command = {**os.environ, **surroundings(folder, **environment)}, [sys.executable, "-m", "vlm_cli", *words]
    return subprocess.run(command, cwd=folder, env=own, input="y\ny\ny\n", capture_output=True, text=True, timeout=120)


def process_copy(words: list[str], folder: Path, **environment: str) -> Ended:
    """Run `vlm` as `process` does, in a copy of this process."""

    def work() -> int:
        importlib.reload(huggingface_hub.constants)  # it keeps what the environment said
        huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
        sys.argv = ["vlm", *words]
        return main()

    return run_in_copy(work, folder=folder, stdin=b"y\ny\ny\n", **surroundings(folder, **environment))


#: Each file with two of the commands, and each command with two files or more; a process takes seconds.
PAIRS = [(COMMANDS[(i + shift) % len(COMMANDS)], name) for i, name in enumerate(VLM_FILES) for shift in (0, 5)]


@pytest.mark.attack
@pytest.mark.parametrize(("command", "name"), PAIRS)
def test_no_code_in_a_process(hostile, made, marker, tmp_path, command, name):
    change, words = VLM_FILES[name]
    model = hostile("vlm", change)
    done = process(words_of(command, model, made, tmp_path / "out"), tmp_path)
    assert not marker.exists() and done.returncode == 1 and not done.stdout
    assert words in done.stderr and done.stderr.count("Error:") == 1 and "Traceback" not in done.stderr
    assert "[y/N]" not in done.stderr, done.stderr


@pytest.mark.parametrize("run", [process_copy, pytest.param(process, marks=pytest.mark.attack)])
def test_no_code_from_the_hub(hostile, made, marker, tmp_path, run):
    model, lm = hostile("vlm", VLM_FILES["tokenizer"][0]), hostile("lm", LM_FILES["configuration"][0])
    with serving() as hub:
        hub.add("org/vlm", model)
        hub.add("org/lm", lm)
        online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        answer = run(["generate", "-", "-m", "org/vlm", "-n", "1"], tmp_path, **online)
        parts = ["--family", "llava", "--vision-encoder", f"local-dir:{made / 'tower'}", "--language-model", "org/lm"]
        built = run(["build", "out", *parts], tmp_path, **online)
        fetched = [x for x in hub.requests if x.endswith(".py") and x.startswith("GET")]
    assert not marker.exists() and not fetched
    assert answer.returncode == 1 and "tokenizer_config.json asks for evil.Thing (auto_map)" in answer.stderr
    assert built.returncode == 1 and "config.json asks for evil.Thing (auto_map)" in built.stderr


def test_no_library_asks_on_stdin(tmp_path):
    """`main` takes `input` away; the editor of a chat's lines has kept it."""
    script = "import sys; from vlm_cli.cli import app, line_editor; kept = line_editor._read_line\n"
    script += "sys.argv = ['vlm', '--version']\napp.main()\nprint(kept())\n"
    script += "try:\n    input('[y/N]')\nexcept app.VLMError as error:\n    print(error)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, input="typed\ny\n", capture_output=True, text=True, timeout=60
    )
    assert "typed\na library wanted to ask a question on stdin" in done.stdout, done.stderr
