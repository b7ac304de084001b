"""lmms-eval asks a model of vlm, where lmms-eval is installed: offline, a task whose data lie beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomllib
from PIL import Image

from tests.support import ROOT

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed: pip install 'vlm-cli[lmms-eval]'")
GROUP = "lmms_eval.models"
POINTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


@pytest.fixture(scope="module")
def model() -> Any:
    from vlm_cli.evaluation.harness import HarnessModel

    found = HarnessModel("demo", batch_size=2, device="cpu")
    pictures = [{"picture": Image.open(ROOT / "examples" / "images" / f"{x}.png")} for x in ("one", "two")]
    found.task_dict["scenes"] = {"test": pictures}
    return found


def requests(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=(*args, i, "scenes", "test")) for i in range(2)]


def see(doc: dict[str, Any]) -> list[Any]:
    return [doc["picture"]]


QUESTION, ONE, TWO = "Describe the image.", "a small green cross.", "a small yellow cross above a large red heart."


def test_answers(model: Any) -> None:
    answers = model.generate_until(requests(QUESTION, {"max_new_tokens": 32, "until": ["\n\n"]}, see))
    assert [x.strip() for x in answers] == [ONE, TWO]
    short = model.generate_until(requests(QUESTION, {"max_new_tokens": 32, "until": ["cross"]}, see))
    assert [x.strip() for x in short] == ["a small green", "a small yellow"]


def test_the_least_value_is_the_likeliest(model: Any) -> None:
    right, wrong = (model.loglikelihood(requests(QUESTION, f" {text}", see)) for text in (ONE, TWO))
    assert right[0][0] < wrong[0][0] and right[1][0] > wrong[1][0]
    assert [right[0][1], right[1][1], wrong[0][1], wrong[1][1]] == [True, False, False, True]


def test_rounds(model: Any) -> None:
    def ask(doc: Any, *, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        ends = round_idx > (1 if doc is model.task_dict["scenes"]["test"][0] else 2)
        return see(doc), QUESTION, ends, previous_output, previous_round_info

    found = model.generate_until_multi_round(requests(QUESTION, {"max_new_tokens": 32}, see, ask))
    assert [[x.strip() for x in of] for of in found] == [[ONE] * 2, [TWO] * 3]


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"pretraind": "demo"}, "does not know the argument 'pretraind'. Known: pretrained, batch_size"),
        ({"batch_size": "auto"}, "batch_size must be a number of requests, got 'auto'"),
    ],
)
def test_arguments_that_are_refused(keywords: dict[str, Any], says: str) -> None:
    from vlm_cli.errors import UsageError
    from vlm_cli.evaluation.harness import HarnessModel

    with pytest.raises(UsageError) as caught:
        HarnessModel(**keywords)
    assert says in str(caught.value)


@pytest.mark.matrix
def test_the_command(tmp_path: Path) -> None:
    """The real command finds the entry point; it ends with 0 after any failure, so that only its results tell."""
    info = tmp_path / "packages" / "vlm_cli_points-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vlm-cli-points\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in POINTS.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    path = os.pathsep.join([str(ROOT), str(info.parent), os.environ.get("PYTHONPATH", "")])
    tasks = ["three_scenes", "three_scenes_likelihood", "three_scenes_rounds"]
    words = ["--model", "vlm", "--model_args", "pretrained=demo", "--tasks", ",".join(tasks), "--batch_size", "2"]
    words += ["--include_path", "examples/lmms_eval", "--output_path", str(tmp_path / "out")]
    variables = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    found = list((tmp_path / "out").rglob("*_results.json"))
    assert len(found) == 1, done.stdout + done.stderr
    results = json.loads(found[0].read_text())["results"]
    assert results["three_scenes"]["exact_match,none"] == pytest.approx(2 / 3)
    assert results["three_scenes_likelihood"]["best_choice,none"] == pytest.approx(2 / 3)
    assert results["three_scenes_rounds"]["both_rounds,none"] == pytest.approx(2 / 3)
