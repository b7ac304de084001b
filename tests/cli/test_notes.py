"""Notes on stderr: one line each, only where there is something to say, and none with --quiet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import ROOT
from tests.support.grid import first_of
from vlm_cli.cli import console
from vlm_cli.cli.sampling import cut_note
from vlm_cli.printable import count_of

SCENE, PHOTOGRAPH = (ROOT / "examples/images" / name for name in ("three.png", "cat.jpg"))
ABOUT_PHOTOGRAPHS = "Note: demo knows drawn scenes only; about a photograph it is confident and wrong."
CUT = "Note: the answer was cut at 2 tokens, before a stop token; --max-new-tokens allows more."


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"<image:{PHOTOGRAPH}>Describe the image."}, {"prompt": f"<image:{SCENE}>Describe the image."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("image", [SCENE, PHOTOGRAPH])
def test_the_demo_knows_scenes(vlm: Any, image: Path) -> None:
    notes = vlm("generate", f"<image:{image}>Q: How many things are there? A:").stderr.splitlines()
    assert (ABOUT_PHOTOGRAPHS in notes) == (image == PHOTOGRAPH)
    assert "Model demo on cpu, bfloat16" in notes and not [x for x in notes if x.startswith("Note") and "cut" in x]
    turn = f"<image:{image}>Describe the image.\n"
    assert (ABOUT_PHOTOGRAPHS in vlm("chat", "-n", 9, input=turn).stderr) == (image == PHOTOGRAPH)


def test_an_answer_that_is_cut(vlm: Any) -> None:
    result = vlm("generate", f"<image:{SCENE}>Describe the image.", "-n", 2)
    assert result.stderr.splitlines()[-1] == CUT


@pytest.mark.matrix
def test_a_batch(vlm: Any, prompts: Path, tmp_path: Path) -> None:
    result = vlm("batch", prompts, "-o", tmp_path / "out.jsonl", "-n", 2)
    assert ABOUT_PHOTOGRAPHS in result.stderr
    assert "Note: 2 of 2 answers were cut at 2 tokens, before a stop token;" in result.stderr
    prompts.write_text(prompts.read_text().splitlines()[1] + "\n")
    result = vlm("batch", prompts, "-o", tmp_path / "one.jsonl")
    assert ABOUT_PHOTOGRAPHS not in result.stderr and "cut at" not in result.stderr
    assert "1 row, 0 failed, " in result.stderr and "1 image encoded of 1 used" in result.stderr


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Records over pictures of which something must be told, with a text that has a tag."""
    frames = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "cafe\u0301.png")
    prompts = ["<image:a.gif>What?", "<image:b.gif>A <images>?", "<image:caf\u00e9.png>An <img>?", "<image:a.gif>Why?"]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"prompt": x, "completion": " A"}) + "\n" for x in prompts))
    return path


@pytest.mark.sample(1)
@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("command", ["batch", "eval", "train"])
def test_notes_of_pictures_are_told_once_with_a_count(
    vlm: Any, pictures: Path, tmp_path: Path, command: str, quiet: bool
) -> None:
    out = tmp_path / "out"
    words: dict[str, list[Any]] = {
        "batch": [pictures, "-o", out, "-n", 1],
        "eval": ["--data", pictures, "--max-new-tokens", 1],
        "train": ["demo", "--data", pictures, "-o", out, "--max-steps", 2, "--batch-size", 2],
    }
    result = vlm(command, *words[command], *(["--quiet"] if quiet else []))
    assert result.exit_code == 0
    told = [line for line in result.stderr.splitlines() if not line.startswith(f"Wrote {out}")]
    if quiet:
        assert told == []
        return
    counted = [line for line in told if line.endswith(": first frame of an animation")]
    assert len(counted) == 1 and counted[0].startswith("2 images, such as ")
    assert "Image caf\u00e9.png: its file is called 'cafe\\u0301.png'" in told
    assert len([line for line in told if "<images>, which is read as text" in line and "1 more line does" in line]) == 1


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", first_of(["batch", "generate", "chat", "doctor"]))
def test_quiet(vlm: Any, prompts: Path, tmp_path: Path, command: str) -> None:
    prompt = f"<image:{PHOTOGRAPH}>Describe the image."
    words: dict[str, list[Any]] = {
        "generate": [prompt, "-n", 2],
        "chat": ["-n", 2, "-p", prompt],
        "batch": [prompts, "-o", tmp_path / "out.jsonl", "-n", 2],
        "doctor": ["--quick"],
    }
    result = vlm(command, *words[command], "--quiet", input="")
    assert result.exit_code == 0
    assert result.stderr == (f"Wrote {tmp_path / 'out.jsonl'}\n" if command == "batch" else "")
    console.note("is heard")  # by nobody: the option holds until the next command
    assert console.is_quiet() and vlm("list", "families").exit_code == 0 and not console.is_quiet()


def test_counts() -> None:
    assert [count_of(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert cut_note(1, 3, 1, 64) == "Note: 1 of 3 answers was cut at 1 token, where the context of the model ends."
