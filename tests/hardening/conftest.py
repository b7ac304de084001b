"""The files that the attack damages and the commands that it interrupts, made once, and the seed of the attack."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.hardening.interrupting import Job, Whole
    from tests.hardening.subjects import Workshop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    from tests.hardening.subjects import make

    return make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def hardening_seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("hardening_seed"))


@pytest.fixture(scope="session")
def jobs(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """A job for each command that writes; each takes a part of a second."""
    from tests.hardening.interrupting import Job
    from tests.support import disk

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").symlink_to(shop.folder / "images")
    rows = [{"prompt": f"<image:images/a.png>The {i}", "completion": " A.", "kind": "x", "id": i} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, data = str(shop.folder / "model"), str(folder / "rows.jsonl")
    dropout = ["--vision-tokenizer", "qformer", "--set", "vision_tokenizer.dropout=0.5"]
    sizes = [f"vision_tokenizer.{x}" for x in ("depth=1", "num_heads=2", "dim=16", "dim_ff=16", "num_queries=2")]
    learner = str(folder / "learner")
    words = [*shop.compose, *shop.language_model, *dropout, *(x for size in sizes for x in ("--set", size))]
    assert disk.run("build", learner, *words).exit_code == 0
    steps = ["--max-steps", "6", "-b", "2", "--save-every", "2", "--log-every", "1", "--eval-data", data]
    return {
        "build": Job("build", ["build", "out", *shop.compose, *shop.language_model]),
        "export": Job("export", ["export", model, "out", "--format", "language-model"]),
        "train": Job(
            "train", ["train", learner, "-d", data, "-o", "out", *steps], kept=["out.checkpoints"], resume=["--resume"]
        ),
        "batch": Job(
            "batch",
            ["batch", data, "-m", model, "-o", "out", "-n", "4", "-b", "2", "--workers", "0"],
            kept=["out.partial"],
        ),
        "eval": Job(
            "eval",
            ["eval", model, "-d", data, "-o", "out", "--html", "out.html", "-n", "2"],
            outputs=["out", "out.html"],
        ),
    }


@pytest.fixture(scope="session")
def whole(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """What an uninterrupted run of a job writes."""
    from tests.hardening.interrupting import uninterrupted

    known: dict[str, Whole] = {}

    def find(name: str) -> Whole:
        if name not in known:
            known[name] = uninterrupted(jobs[name], tmp_path_factory.mktemp(name))
        return known[name]

    return find
