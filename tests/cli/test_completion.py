"""The Tab key: values of options and arguments, and the scripts that shells read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer._completion_shared import get_completion_script
from typer.testing import CliRunner

from vlm_cli.checkpoint.export.formats import FORMATS
from vlm_cli.cli.app import app
from vlm_cli.cli.list_parts import KINDS
from vlm_cli.composition import FAMILIES, PARTS
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of vlm, a language model, and other things."""
    for name, text in (("mine", '{"model_type": "vlm"}'), ("lm", '{"model_type": "llama"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "empty").mkdir()
    for name in ("parts.yaml", "small.gguf", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offered(*words: str) -> list[str]:
    """What bash offers for the last word."""
    environment = {"_VLM_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(["vlm", *words])}
    environment |= {"COMP_CWORD": str(len(words))}
    return CliRunner().invoke(app, [], prog_name="vlm", env=environment).stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["list", ""], [*KINDS]),
        (["build", "--family", ""], [*FAMILIES]),
        (["build", "--family", "k"], ["kosmos"]),
        (["build", "--vision-encoder", "RN50x4"], ["RN50x4-quickgelu", "RN50x4"]),
        (["build", "--vision-encoder", "RN50:"], ["RN50:openai", "RN50:yfcc15m", "RN50:cc12m"]),
        (["build", "--vision-encoder", "nobody:"], []),
        (["build", "--vision-encoder", "h"], ["hf:"]),
        (["build", "--vision-encoder", "ti"], ["timm:"]),
        (["build", "--vision-encoder", "hf:"], ["hf:lm"]),
        (["build", "--vision-encoder", "hf:./l"], ["hf:./lm"]),
        (["build", "--vision-encoder", "timm:levit_128"], ["timm:levit_128", "timm:levit_128s"]),
        (["build", "--vision-encoder", "timm:levit_128."], ["timm:levit_128.fb_dist_in1k"]),
        (["build", "--vision-tokenizer", ""], [*VISION_TOKENIZERS]),
        (["build", "--fusion", "l"], [x for x in FUSIONS if x.startswith("l")]),
        (["build", "--language-model", ""], ["lm", "small.gguf"]),
        (["build", "--set", "vision_tokenizer.num_l"], ["vision_tokenizer.num_latents="]),
        (["build", "--dtype", "b"], ["bfloat16"]),
        (["export", "mine", "out", "--format", ""], [*FORMATS]),
        (["generate", "--model", ""], ["mine", "demo"]),
        (["generate", "--device", "c"], ["cpu", "cuda"]),
        (["generate", "--quantize", ""], ["int8", "int4", "fp8"]),
        (["chat", "./"], ["./mine"]),
        (["train", "m"], ["mine"]),
        (["train", "mine", "--trainable", "fusion,"], [f"fusion,{part}" for part in PARTS if part != "fusion"]),
        (["inspect", ""], ["mine", "demo", *FAMILIES, "parts.yaml"]),
        (["inspect", "nowhere/"], []),
    ],
)
def test_values(folder: Path, words: list[str], found: list[str]) -> None:
    assert offered(*words) == found


def test_scripts() -> None:
    """zsh calls the completion at the first Tab; bash takes `ViT-B-32:openai` for one word."""
    keywords = {"prog_name": "vlm", "complete_var": "_VLM_COMPLETE"}
    shown = {shell: get_completion_script(shell=shell, **keywords) for shell in ("zsh", "bash")}
    assert shown["zsh"].splitlines()[-5:] == [
        "if [[ $zsh_eval_context[-1] == loadautofunc ]]; then",
        '  _vlm_completion "$@"',
        "else",
        "  compdef _vlm_completion vlm",
        "fi",
    ]
    assert shown["bash"].endswith("\nCOMP_WORDBREAKS=${COMP_WORDBREAKS//:}")


@pytest.mark.parametrize("columns", ["60", "80"])
def test_help_is_whole(columns: str) -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": columns}).stdout
    assert "…" not in text and "..." not in text.partition("\n\n")[2]
    assert "Start here: vlm generate" in text
    for command in ("train", "generate", "build"):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": columns}).stdout
        assert not [line for line in text.splitlines() if re.search(r"\w-$", line.rstrip())]


def test_an_example_that_is_wrapped_can_be_pasted() -> None:
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "80"}).stdout
    example = text[text.index("Example: ") :].partition("\n\n")[0]
    assert example.replace(" \\\n", "").split()[1:3] == ["vlm", "train"] and " \\\n" in example
    assert json.dumps(example).count("--max-steps 1000") == 1
