"""`vlm batch --engine ray`: the answers of one process, whichever process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "examples" / "images" / "two.png"
ROWS, EACH = 40, 4

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Prompts of which every tenth names a picture that is not there."""
    pytest.importorskip("ray.data")
    path = tmp_path_factory.mktemp("ray") / "in.jsonl"
    words = ["Describe the image.", "What is above?", "A"]
    rows = [
        {"prompt": f"<image:{PICTURE if i % 10 else 'gone.png'}>{words[i % 3]}", "id": f"r{i}"} for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(prompts, vlm) -> list[dict]:
    """What one process answers."""
    out = prompts.with_name("one.jsonl")
    found = vlm("batch", prompts, "--output", out, "--max-new-tokens", 8, "--dtype", "float32")
    assert found.exit_code == 1, found.stderr
    return lines(out)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def start(prompts: Path, out: Path, scheme: str = "") -> subprocess.Popen[str]:
    words = [
        "batch",
        f"{scheme}{prompts}",
        "--output",
        f"{scheme}{out}",
        "--max-new-tokens",
        8,
        "--dtype",
        "float32",
        "--engine",
        "ray",
    ]
    words += ["--part-rows", EACH, "--actors", 2, "--actor-cpus", 0.5]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlm_cli", *map(str, words)]
    # A session of its own: what a killed run leaves behind is found by it.
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_parts(run: subprocess.Popen[str], out: Path, number: int) -> None:
    deadline = time.monotonic() + 400
    while len(list(out.glob("part-*"))) < number:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check(out: Path, expected: list[dict]) -> None:
    """Each row once, in order, with the answer of one process."""
    found = [row for path in sorted(out.glob("part-*")) for row in lines(path)]
    assert [row["id"] for row in found] == [f"r{i}" for i in range(ROWS)]
    assert [row.get("text") for row in found] == [row.get("text") for row in expected]
    assert [row.get("error") for row in found] == [row.get("error") for row in expected]
    assert not list(out.glob(".*"))


def test_a_killed_actor_loses_nothing(prompts, expected, tmp_path):
    run, out = start(prompts, tmp_path / "out"), tmp_path / "out"
    try:
        wait_for_parts(run, out, 1)
        actors = [
            x for x in psutil.Process(run.pid).children(recursive=True) if "PieceAnswerer" in " ".join(x.cmdline())
        ]
        assert actors
        actors[0].kill()
        told = run.communicate(timeout=500)
    finally:
        run.kill()
    assert run.returncode == 1 and "could not be answered" in told[1], told
    check(out, expected)


@pytest.mark.parametrize("scheme", ["", "local://"])  # fsspec's own files stand for an object store
def test_a_killed_run_goes_on(prompts, expected, tmp_path, scheme):
    out = tmp_path / "out"
    run = start(prompts, out, scheme)
    try:
        wait_for_parts(run, out, 2)
    finally:
        children = psutil.Process(run.pid).children(recursive=True)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        psutil.wait_procs(children, timeout=60)  # Ray ends with the run
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 2 <= len(kept) < ROWS // EACH
    second = start(prompts, out, scheme)
    told = second.communicate(timeout=500)[1]
    assert second.returncode == 1 and "Resuming after" in told, told
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept  # nothing is answered twice
    check(out, expected)
    assert sum(len(lines(path)) for path in out.glob("part-*")) == len(expected)
