"""Each program of docs/interop.md prints what the page shows, in a process that does not import vlm first."""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

import vlm_cli
from tests.support import ROOT
from tests.support.markdown import blocks, table

PAGE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
PORT = "8000"


@dataclass(frozen=True)
class Bridge:
    """A section with a program: its heading, a server to start first, the program, and what it prints."""

    heading: str
    server: str | None
    program: str
    printed: str


def find_bridges() -> list[Bridge]:
    sections = re.split(r"^#{2,3} (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    found = []
    for heading, section in zip(sections[::2], sections[1::2], strict=True):
        programs, printed, console = (blocks(section, x) for x in ("python", "text", "console"))
        assert len(programs) == len(printed) <= 1 and len(console) <= 1, heading
        server = console[0].removeprefix("$ ").strip() if console else None
        found += [Bridge(heading, server, *pair) for pair in zip(programs, printed, strict=True)]
    return found


BRIDGES = find_bridges()
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the directory of the page and the pictures of the repository."""
    path = tmp_path_factory.mktemp("interop")
    shutil.copytree(ROOT / "examples" / "images", path / "examples" / "images")
    vlm_cli.save(*vlm_cli.load("demo"), path / "my-vlm")
    return path


@contextmanager
def serving(command: str, port: int, folder: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    name, *words = command.replace(PORT, str(port)).split()
    module = {"transformers": "transformers.cli.transformers", "vlm": "vlm_cli"}[name]
    log = folder / f"{name}.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *words], cwd=folder, env=environment(folder), stdout=file, stderr=file
        )
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except (URLError, OSError):
                    assert server.poll() is None, log.read_text()[-2000:]
                    time.sleep(0.2)
            yield
        finally:
            server.terminate()
            server.wait(30)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "HF_HOME": str(folder / "home")}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.matrix
@pytest.mark.parametrize("bridge", BRIDGES, ids=[bridge.heading for bridge in BRIDGES])
def test_the_other_program_prints_what_the_page_shows(folder, bridge):
    needed = {x for x in ("trl", "datasets", "openai") if re.search(rf"^(?:from|import) {x}\b", bridge.program, re.M)}
    needed |= {"fastapi", "uvicorn"} if "transformers serve" in (bridge.server or "") else set()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    port = free_port()
    with serving(bridge.server, port, folder) if bridge.server else nullcontext():
        done = subprocess.run(
            [sys.executable, "-c", bridge.program.replace(PORT, str(port))],
            cwd=folder,
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [
        line for line in done.stdout.splitlines() if not line.startswith("{'")
    ]  # the log of Transformers' Trainer
    assert printed == bridge.printed.splitlines()
    if 'save_model("trained")' in bridge.program:
        vlm_cli.load(str(folder / "trained"))


@pytest.mark.matrix
def test_vlmevalkit_writes_the_answers_that_the_page_shows(folder):
    """VLMEvalKit is on no package index: this runs where a checkout is on the path, with what its client needs."""
    found = importlib.util.find_spec("vlmeval")
    if found is None or importlib.util.find_spec("openpyxl") is None:
        pytest.skip("not installed: a checkout of VLMEvalKit, or openpyxl")
    import pandas

    section = PAGE[PAGE.index("## VLMEvalKit") :]
    wanted = dict(table(section, "picture"))
    with (folder / "scenes.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "question", "answer"])
        for name in wanted:
            picture = base64.b64encode((folder / "examples" / "images" / name).read_bytes()).decode()
            rows.writerow([name, picture, "Describe the image.", "none"])
    settings = json.loads(blocks(section, "json")[0])
    settings["data"] = {"scenes": {"class": "CustomVQADataset", "dataset": "scenes"}}
    port, program = free_port(), Path(str(found.origin)).parent.parent / "run.py"
    written = json.dumps(settings).replace(PORT, str(port)).replace("MODEL", "my-vlm")
    (folder / "vlm.json").write_text(written, encoding="utf-8")
    variables = {**environment(folder), "LMUData": str(folder), "PRED_FORMAT": "xlsx"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    words = [sys.executable, str(program), "--config", "vlm.json", "--mode", "infer", "--work-dir", "kit"]
    with serving(f"vlm serve my-vlm --port {PORT} --api-key sk-vlm", port, folder):
        done = subprocess.run(
            words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False
        )
    results = list((folder / "kit").rglob("my-vlm_scenes.xlsx"))
    assert len(results) == 1, done.stdout + done.stderr
    answers = pandas.read_excel(results[0])
    assert dict(zip(answers["index"], answers["prediction"], strict=True)) == wanted


def test_the_page_names_versions_that_are_supported():
    versions = {row[0]: row[1] for row in table(PAGE, "program")}
    assert all(re.fullmatch(r"[\d.]+(, [\d.]+)*", version) for version in versions.values()) and len(versions) == 4
    assert {bridge.server and bridge.server.split()[0] for bridge in BRIDGES} == {None, "transformers", "vlm"}
