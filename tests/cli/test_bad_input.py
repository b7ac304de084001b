"""Everything that can go wrong: a message that helps, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import vlm_cli.checkpoint.building as building
import vlm_cli.checkpoint.saving as saving
from tests.support.grid import first_of, first_rows, grid
from vlm_cli import VLM, files, renames
from vlm_cli.cli.app import main
from vlm_cli.hub_ids import is_hub_id


@pytest.fixture
def fails(vlm):
    """Run, and check the exit code and words of the only thing that is printed."""

    def run(code, words, *arguments, **keywords):
        result = vlm(*arguments, **keywords)
        assert result.exit_code == code, result.output
        assert not result.stdout
        message = result.stderr.partition("Error: ")[2] or result.stderr
        for word in [words] if isinstance(words, str) else words:
            assert word in message
        return message

    return run


@pytest.fixture
def build_fails(fails, parts, tmp_path):
    """`vlm build` fails and leaves nothing."""

    def run(code, words, *flags, out="out", **keywords):
        before = sorted(tmp_path.rglob("*"))
        message = fails(code, words, "build", tmp_path / out, *parts.flamingo, *flags, **keywords)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


# -- images ------------------------------------------------------------------------------------------------------------


def an_image(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        Image.effect_noise((64, 64), 90).save(path)
        data = path.read_bytes()
        if kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        else:  # a header that promises 30000 × 30000 pixels
            header = data[12:16] + (30000).to_bytes(4, "big") * 2 + data[24:29]
            path.write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])
    return path


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "cannot find"),
        ("directory", "is a directory"),
        ("text", "is not an image"),
        ("empty", "is empty (0 bytes)"),
        ("truncated", "is damaged or cut short"),
        ("huge", "decompression bomb"),
    ],
)
def test_images_that_are_none(fails, flamingo, tmp_path, kind, words):
    path = an_image(tmp_path, kind)
    fails(1, [words, path.name], "generate", "-m", flamingo, "<image>hi", "-i", path)
    fails(1, [words, path.name], "generate", "-m", flamingo, f"<image:{path}>hi")


def test_a_url_is_not_fetched_unless_allowed(fails, flamingo):
    fails(1, "--allow-urls", "generate", "-m", flamingo, "<image:https://example.org/a.png>")


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_placeholders_and_files_must_match(fails, flamingo, photo):
    command = ("generate", "-m", flamingo)
    fails(2, ["2 bare <image> placeholders", "has no file"], *command, "<image> and <image>", "-i", photo)
    fails(2, ["1 bare <image> placeholder", "has no placeholder"], *command, "<image>", "-i", photo, "-i", photo)
    fails(2, "no file", *command, "<image>")
    fails(2, "is not closed", *command, "<image:a.png")
    fails(2, "no file", "inspect", flamingo, "--prompt", "<image>")
    fails(2, "--image needs --prompt", "inspect", flamingo, "-i", photo)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(fails, flamingo, tmp_path, prompt):
    command = ("generate", "-m", flamingo)
    fails(2, "the prompt is empty", *command, prompt)
    fails(2, "the prompt is empty", *command, input=prompt)
    (tmp_path / "p.txt").write_text(prompt)
    fails(2, "the prompt is empty", *command, "-f", tmp_path / "p.txt")


def test_a_prompt_longer_than_the_context(fails, flamingo, kosmos, photo):
    words = ["positions, but the language model has 2048", "vlm inspect --prompt"]
    fails(2, words, "generate", "-m", flamingo, " cat" * 2100)
    fails(2, words, "generate", "-m", kosmos, "<image>" + " cat" * 2045, "-i", photo)


def test_a_prompt_that_is_given_twice_or_not_readable(fails, flamingo, photo, tmp_path):
    command = ("generate", "-m", flamingo)
    fails(2, "more than once", *command, "hi", "-p", "hi")
    fails(2, "cannot read the prompt file", *command, "-f", tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    fails(2, "cannot read the prompt file", *command, "-f", tmp_path / "latin.txt")
    fails(2, "not UTF-8 text", *command, input=b"\xff\xfe")
    fails(2, "not UTF-8 text", *command, "h\udcff")
    fails(2, "stdin can be the prompt or an image, not both", *command, "-", "-i", "-", input=photo.read_bytes())


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--device", ""], "device '' cannot be used here"),
        (["--dtype", "float23"], "unknown dtype 'float23'. Did you mean 'float32'?"),
        (["--temperature", 0, "--top-p", 0.5], "--temperature 0 is greedy, so --top-p has no effect"),
        (["--num-return-sequences", 2], "greedy search gives one answer"),
        (["--stop", ""], "--stop needs a text"),
        (["--temperature", -1], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", 1.5], "--top-p"),
        (["--seed", -1], "--seed"),
        (["--seed", 2**32], "--seed"),
        (["-n", 0], "--max-new-tokens"),
        (["--revision", "main"], "--revision is for hub ids"),
    ],
)
def test_options_of_generate(fails, flamingo, flags, words):
    fails(2, words, "generate", "-m", flamingo, "hi", *flags)


def test_generate_needs_a_model_that_runs(fails, flamingo, parts, tmp_path):
    fails(2, "unknown model 'flamigo'", "generate", "-m", "flamigo", "hi")
    fails(2, "vlm build OUT --family flamingo", "generate", "-m", "flamingo", "hi")
    fails(2, "vlm build OUT --config", "generate", "-m", flamingo / "composition.yaml", "hi")
    fails(2, "is no composition", "generate", "-m", flamingo / "model.safetensors", "hi")
    fails(
        1,
        "not a VLM that `vlm build` wrote; so says model_type in config.json. To compose a VLM with it",
        "generate",
        "-m",
        parts.language_model,
        "hi",
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--seed", -1], "--seed"),
        (["--max-shard-size", "big"], "--max-shard-size expects"),
        (["--max-shard-size", "0MB"], "--max-shard-size expects"),
        (["--set", "depth"], "--set expects NAME=VALUE"),
        (["--set", "a.b.c=1"], "--set expects NAME=VALUE"),
        (["--set", "fusion.every={"], "is not YAML"),
        (["--set", "fusion.every=two"], "fusion.every must be a whole number, got 'two'"),
        (["--set", "fusion.every=0"], "fusion.every must be at least 1"),
        (["--set", "fusion.attend=some"], "fusion.attend must be 'last' or 'all'"),
        (["--trainable", "fusio"], "Did you mean 'fusion'?"),
        (["--family", "flamngo"], "unknown family 'flamngo'. Did you mean 'flamingo'?"),
        (["--fusion", "cross"], "unknown fusion 'cross'"),
        (["--vision-tokenizer", "q-former"], "unknown vision tokenizer 'q-former'. Did you mean 'qformer'?"),
        (["--config", "/nowhere.yaml"], "cannot read composition file"),
    ],
)
def test_options_of_build(build_fails, flags, words):
    build_fails(2, words, *flags)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.yaml", "family: [", "line 1"),
        ("c.yaml", "family: flamingo\n\tfusion: 1", "line 2"),
        ("c.yaml", "- a\n- b", "must hold a mapping of parts to settings, but holds ['a', 'b']"),
        ("c.yaml", "", "must hold a mapping of parts"),
        ("c.json", "{", "is not valid"),
        ("c.json", '{"family": ["flamingo"]}', "unknown family ['flamingo']"),
        ("c.yaml", "vision_tokenizer: 5", "vision_tokenizer must be a name"),
        ("c.yaml", "vision_encoder: [1]", "vision_encoder[0] must be a name or a mapping"),
        ("c.yaml", "weight_decay: much", "weight_decay must be a number"),
        ("c.yaml", "added_tokens: []", "added_tokens must hold '<image>'"),
        ("c.yaml", "tokenizer: perceiver", "unknown key 'tokenizer'"),
    ],
)
def test_broken_composition_files(fails, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    fails(2, words, "count-params", tmp_path / name)
    fails(2, words, "build", tmp_path / "out", "--config", tmp_path / name)


# -- vision encoders and language models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("ViT-B32", 2, "unknown vision encoder 'ViT-B32'. Did you mean 'ViT-B-32'?"),
        ("ViT-B-32:opnai", 2, "Did you mean 'openai'? Known tags: "),
        ("local-dir:nowhere", 1, "there is no directory"),
        ("nowhere.json", 1, "cannot read the OpenCLIP configuration"),
    ],
)
def test_unknown_encoders(build_fails, name, code, words):
    build_fails(code, words, "--vision-encoder", name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold a mapping"),
        ("{}", "lacks embed_dim or vision_cfg"),
        ('{"embed_dim": 8, "vision_cfg": 5}', "lacks embed_dim or vision_cfg"),
        ('{"embed_dim": 8, "vision_cfg": {"depth": 5}}', "does not give features"),
    ],
)
def test_broken_openclip_configurations(build_fails, tmp_path, text, words):
    (tmp_path / "t.json").write_text(text)
    build_fails(2 if "features" in words else 1, words, "--vision-encoder", tmp_path / "t.json")


@pytest.mark.parametrize("name", ["ViT-B-32:openai", "hf-hub:timm/ViT-B-16-SigLIP"])
def test_encoders_of_the_hub_on_a_machine_without_network(build_fails, name):
    build_fails(1, ["cannot fetch", "HF_HOME", "local-dir:", "--random-weights"], "--vision-encoder", name)


@pytest.mark.parametrize("name", ["gpt2", "some-org/some-model"])
def test_language_models_of_the_hub_on_a_machine_without_network(build_fails, name):
    words = [f"cannot find language model {name!r}", "HF_HOME", "local directory or GGUF file"]
    build_fails(1, words, "--language-model", name)


def test_a_panic_of_a_library_in_rust_is_an_error(fails, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 makes it: no Exception."""

    def panic(*args: object, **keywords: object) -> None:
        raise PanicException("range start index 28 out of range")

    monkeypatch.setattr("vlm_cli.checkpoint.directory.read_config", panic)
    fails(1, "a library cannot handle a file of the model: range start index 28", "count-params", "demo")


PATHS = ["/tmp/nowhere", "./nowhere", "~/nowhere", "a/b/c", "org/no where"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("words", "possible"),
    [
        (["generate", "hi", "-m"], "a directory that `vlm build` wrote, or a hub id"),
        (["inspect"], "a directory that `vlm build` wrote, or a hub id"),
        (["build", "out", "--from"], "a path, or a hub id"),
        (["build", "out", "--family", "llava", "--language-model"], "a GGUF file, or a hub id"),
    ],
)
def test_a_path_that_leads_nowhere_is_no_hub_id(fails, words, possible, name):
    fails(1, [f"directory {name!r}", possible], *words, name)


def test_a_path_of_a_part_that_leads_nowhere_is_no_hub_id(build_fails):
    build_fails(1, "there is no directory '/tmp/nowhere'", "--set", "language_model.tokenizer=/tmp/nowhere")
    build_fails(1, "there is no directory '/tmp/nowhere'", "--vision-encoder", "local-dir:/tmp/nowhere")
    build_fails(1, "'/tmp/nowhere' is no id of a hub repository", "--vision-encoder", "hf-hub:/tmp/nowhere")


@pytest.mark.parametrize(
    "name", [*PATHS, "gpt2", "org/a.b-c_d", "-x", "a..b", "a--b", "x.git", "a" * 97, "ä/b", "", "a/"]
)
def test_ids_are_those_that_the_hub_accepts(name):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_hub_id(name)
    else:
        assert is_hub_id(name)


def test_a_vlm_of_the_hub_on_a_machine_without_network(fails):
    fails(1, "an offline machine knows only cached ones", "generate", "-m", "some-org/some-vlm", "hi")


def spoil(folder: Path, how: str) -> None:
    """Do to a language model what happens to such directories."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    data = json.loads(config.read_text())
    if how == "no config":
        config.unlink()
    elif how == "broken config":
        config.write_text("{")
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "corrupt weights":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif how == "deeper config":
        config.write_text(json.dumps(data | {"num_hidden_layers": 5}))
    elif how == "wider config":
        config.write_text(json.dumps(data | {"intermediate_size": 130}))
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "tokenizer of its own":
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["words.Words", None]}, "tokenizer_class": "Words"}))
    elif how == "own code":
        own = {"auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}, "model_type": "own"}
        config.write_text(json.dumps(data | own))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", "it has no config.json"),
        ("broken config", "is not valid: it is not JSON: line 1"),
        ("no weights", "no file named model.safetensors"),
        ("truncated weights", "cannot load the weights"),
        ("corrupt weights", "cannot load the weights"),
        ("deeper config", "lack 9 tensors, e.g. 'model.layers.4"),
        ("wider config", "[64, 128] in the file, [64, 130] wanted"),
        ("no tokenizer", ["has no tokenizer", "no tokenizer.json", "language_model.tokenizer="]),
        (
            "tokenizer of its own",
            ["tokenizer_config.json asks for words.Words (auto_map)", "If you trust it, add --trust-remote-code"],
        ),
        ("own code", ["config.json asks for c.C (auto_map)", "If you trust it, add --trust-remote-code"]),
    ],
)
def test_broken_language_models(build_fails, language_model, how, words):
    spoil(language_model, how)
    message = build_fails(1, words, "--language-model", language_model)
    assert "offline" not in message


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("t5", "is an encoder-decoder model"),
        ("bart", "is an encoder-decoder model"),
        ("bert", "is an encoder whose published weights are not causal"),
        ("clip", "which is not a causal language model"),
        ("gpt2", "has no tokenizer: its vocabulary is empty"),
        ("gpt_neox", "has no tokenizer: its vocabulary is empty"),
        ("llama", "has no tokenizer"),
    ],
)
def test_types_that_cannot_stand_here(build_fails, tmp_path, model_type, words):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "lm")
    build_fails(1, words, "--language-model", tmp_path / "lm")


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "nowhere.gguf"])
def test_paths_to_nothing(build_fails, name):
    build_fails(1, "there is no", "--language-model", name)


def test_a_gguf_file_that_is_none(build_fails, tmp_path):
    (tmp_path / "lm.gguf").write_bytes(b"GGUF123")
    build_fails(1, "cannot read the configuration of language model", "--language-model", tmp_path / "lm.gguf")


# -- weights -----------------------------------------------------------------------------------------------------------


class Payload:
    """Writes a file as soon as somebody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("flag", ["--weights", "--set"])
def test_code_inside_of_a_pytorch_file_is_not_run(build_fails, tmp_path, flag):
    file = tmp_path / "evil.pt"
    torch.save({"state_dict": {"visual.proj": Payload(tmp_path / "hacked")}}, file)
    value = file if flag == "--weights" else f"vision_encoder.pretrained={file}"
    message = build_fails(1, "it holds io.open, which is code and no tensor", flag, value)
    assert "weights_only" not in message and not (tmp_path / "hacked").exists()
    torch.load(file, weights_only=False)  # the twin: it is loaded
    assert (tmp_path / "hacked").exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.safetensors", None, "there is no weight file"),
        ("w.safetensors", b"junk", ["cannot read weights", "Is it complete?"]),
        ("w.pt", b"junk", "cannot read weights"),
        ("w.pt", b"", "cannot read weights"),
    ],
)
def test_weight_files_that_are_none(build_fails, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    build_fails(1, words, "--weights", tmp_path / name)


def test_weights_without_named_tensors(build_fails, tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    build_fails(1, "holds no named tensors", "--weights", tmp_path / "w.pt")


def test_weights_of_another_model(build_fails, tmp_path):
    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    build_fails(1, "does not fit the composition", "--weights", tmp_path / "w.safetensors")


# -- directories of a VLM ----------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated config":
        (folder / "config.json").write_text((folder / "config.json").read_text()[:300])
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "future composition":
        data = json.loads((folder / "config.json").read_text())
        data["composition"]["fusion"]["rank"] = 4
        (folder / "config.json").write_text(json.dumps(data))
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:9000])
    else:
        state = load_file(weights)
        name = "vision_tokenizer.latents"
        if how == "missing tensor":
            del state[name]
        elif how == "unknown tensor":
            state["vision_tokenizer.more"] = torch.zeros(3)
        elif how == "another shape":
            state[name] = torch.zeros(3, 48)
        save_file(state, weights, metadata={"format": "pt"})


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated config", "is not valid: it is not JSON: line"),
        ("no config", "is no VLM: it has no config.json"),
        ("future composition", "unknown key fusion.rank"),
        ("no tokenizer", "cannot load"),
        ("no weights", "model.safetensors"),
        ("truncated weights", "Error while deserializing header"),
        ("missing tensor", ["1 tensor missing", "e.g. vision_tokenizer.latents"]),
        ("unknown tensor", "1 not known; e.g. vision_tokenizer.more"),
        ("another shape", "vision_tokenizer.latents"),
    ],
)
def test_broken_directories(fails, flamingo, tmp_path, how, words):
    folder = Path(shutil.copytree(flamingo, tmp_path / "broken"))
    damage(folder, how)
    (folder / "vlm_manifest.json").unlink()  # as in a directory of an earlier version; otherwise it names the weights
    message = fails(1, words, "generate", "-m", folder, "hi")
    assert "broken" in message and "offline" not in message


def test_directories_of_others(fails, parts, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("inspect", "count-params"):
        fails(1, "holds a model of type 'llama', not a VLM", command, parts.language_model)
        fails(1, "is no VLM: it has no config.json", command, tmp_path / "empty")
        fails(2, ["unknown model 'blib'", "Did you mean 'blip'?"], command, "blib")


# -- writing -----------------------------------------------------------------------------------------------------------


def test_out_that_cannot_be(fails, parts, flamingo, tmp_path):
    fails(1, "does not exist", "build", tmp_path / "a/b", *parts.flamingo)
    fails(2, "exists. Choose another name, or add --overwrite", "build", flamingo, *parts.flamingo)
    (tmp_path / "file").write_text("mine")
    fails(2, "exists", "build", tmp_path / "file", *parts.flamingo)
    fails(1, "does not exist", "build", tmp_path / "file/out", *parts.flamingo)


@pytest.fixture
def old(flamingo, tmp_path):
    """A directory of ours that was there before."""
    return Path(shutil.copytree(flamingo, tmp_path / "old"))


@contextmanager
def unchanged(folder):
    """Nothing under `folder` is written, removed or replaced."""

    def state():
        return {path: path.stat().st_ino for path in folder.rglob("*")}

    before = state()
    yield
    assert state() == before


@pytest.mark.sample(2)
@grid(
    place=["weights", "tokenizer", "composition", "swap"],
    error=[OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
)
def test_what_stops_a_build_leaves_nothing(vlm, parts, old, tmp_path, monkeypatch, place, error):
    def stop(*args, **kwargs):
        raise error

    targets = {
        "weights": (VLM, "save_pretrained"),
        "tokenizer": ("vlm_cli.processor.VLMProcessor", "save_pretrained"),
        "composition": (saving.yaml, "safe_dump"),
        "swap": (files, "_put_directory"),
    }
    target, name = targets[place]
    if isinstance(target, str):
        from vlm_cli.processor import VLMProcessor as target
    monkeypatch.setattr(target, name, stop)
    for flags in (["new"], ["old", "--overwrite"]):
        with unchanged(tmp_path):
            result = vlm("build", tmp_path / flags[0], *parts.flamingo, *flags[1:])
        if isinstance(error, OSError):
            assert result.exit_code == 1 and "No space left on device. Nothing was changed." in result.stderr
        else:
            assert result.exit_code == 130 and "Interrupted." in result.stderr


def test_a_swap_that_fails_half_way_puts_the_old_directory_back(vlm, parts, old, tmp_path, monkeypatch):
    """Where the system cannot exchange two names, the old directory steps aside for a moment."""
    monkeypatch.setattr(renames, "_rename_with_flag", lambda *arguments: False)
    original = os.rename

    def rename(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with unchanged(tmp_path):
        assert vlm("build", old, *parts.flamingo, "--overwrite").exit_code == 1


@dataclass
class Process:
    """`vlm` in a process of its own that has imported everything already."""

    pid: int
    output: int  # the end of a pipe

    def wait(self) -> int:
        """Exit code; there must be no traceback."""
        with open(self.output, encoding="utf-8") as file:
            text = file.read()
        assert "Traceback" not in text, text
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(*arguments: object, prepare: Callable[[], object] = lambda: None) -> Process:
    end, output = os.pipe()
    pid = os.fork()
    if pid:
        os.close(output)
        return Process(pid, end)
    try:  # whatever happens, this process must not go on as a second pytest
        sys.stdout = sys.stderr = os.fdopen(output, "w", encoding="utf-8")
        sys.argv = ["vlm", *map(str, arguments)]
        prepare()
        main()
    finally:
        os._exit(99)


@pytest.mark.matrix
@pytest.mark.parametrize(("number", "code"), first_rows([(signal.SIGINT, 130), (signal.SIGTERM, 143)]))
def test_a_signal_in_the_middle_of_a_build(parts, old, tmp_path, monkeypatch, number, code):
    original = building.save

    def slow(model, processor, out, **keywords):
        original(model, processor, out, **keywords)
        (out / "ready").touch()
        time.sleep(60)

    monkeypatch.setattr(building, "save", slow)
    for flags in (["new"], ["old", "--overwrite"]):
        with unchanged(tmp_path):
            process = start("build", tmp_path / flags[0], *parts.flamingo, *flags[1:])
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".*.partial/ready")) and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(process.pid, number)
            assert process.wait() == code


@pytest.mark.matrix
@pytest.mark.parametrize("limit", first_of([10_000, 100, 100_000]))
def test_a_file_that_may_not_grow(parts, old, tmp_path, limit):
    """A limit of the system on file sizes stops real writes at several places, as a full disk does."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    for flags in (["new"], ["old", "--overwrite"]):
        with unchanged(tmp_path):
            assert start("build", tmp_path / flags[0], *parts.flamingo, *flags[1:], prepare=prepare).wait() == 1


@pytest.fixture
def full_disk(tmp_path):
    """1 MB of tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(vlm, parts, full_disk):
    result = vlm("build", full_disk / "out", *parts.flamingo, "--set", "vision_tokenizer.depth=20")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr and "Nothing was changed" in result.stderr
    assert not list(full_disk.iterdir())


# -- the traceback -----------------------------------------------------------------------------------------------------


def test_debug_shows_where(vlm, flamingo, monkeypatch):
    def stop(*args, **kwargs):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(VLM, "generate", stop)
    result = vlm("generate", "-m", flamingo, "hi")
    assert result.exit_code == 1
    assert "Error: ZeroDivisionError: a bug of ours. Run `vlm --debug …`" in result.stderr
    with pytest.raises(ZeroDivisionError):
        vlm("generate", "-m", flamingo, "hi", debug=True)
