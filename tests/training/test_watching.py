"""What a run shows of itself: answers at each checkpoint, the page, the best weights, and the time that is left."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import Result

from tests.support.training import metrics, write
from vlm_cli.cli.eval_options import QuestionOptions
from vlm_cli.evaluation.items import MAX_NEW_TOKENS
from vlm_cli.report.examination import Examination, ExaminedAnswer, Question
from vlm_cli.report.run_page import format_run_page
from vlm_cli.training import budget as budget_module
from vlm_cli.training.best import BestWeights
from vlm_cli.training.budget import RunBudget
from vlm_cli.training.watching import RunPage, preserved_randomness

STEPS = ("--batch-size", 6, "--log-every", 1, "--learning-rate", 3e-3, "--save-every", 2)


@pytest.fixture
def train(vlm: Callable[..., Result], folder: Path, cross_attention: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train the cross-attention model, and return the output."""

    def run(name: str, *arguments: Any) -> Path:
        out = tmp_path / name
        data = folder / "train.jsonl"
        result = vlm("train", cross_attention, "-d", data, "-o", out, *STEPS, *arguments)
        assert result.exit_code == 0, result.stderr + repr(result.exception)
        (tmp_path / f"{name}.log").write_text(result.stderr)
        return out

    return run


@pytest.fixture
def held_out(folder: Path) -> tuple[Any, ...]:
    names = ("red", "blue", "green") * 2
    records = [
        {"prompt": f"<image:{x}.png>Caption:", "completion": f" {x}", "id": f"{x}{i}"} for i, x in enumerate(names)
    ]
    return ("--eval-data", write(folder / "held-out.jsonl", records))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


@pytest.mark.matrix
def test_questions_at_checkpoints_change_nothing_that_is_learned(
    vlm: Any, train: Any, held_out: Any, folder: Path, tmp_path: Path, cross_attention: Path
) -> None:
    plain = train("plain", "--max-steps", 4)
    asked = train("asked", "--max-steps", 4, *held_out, "--eval-answers", 6)
    assert are_equal(weights(plain), weights(asked)) and not are_equal(weights(plain), weights(cross_attention))

    # The answers are those of `vlm eval`, in the files, in the log and on the page.
    found = answers(asked)
    assert [x["step"] for x in found] == [0, 2, 4]
    graded = json.loads(vlm("eval", asked, "--data", folder / "held-out.jsonl", "--json").stdout)
    wanted = [(x["id"], x["answer"], x["scores"]["exact"] == 1) for x in graded["answers"]]
    right = graded["total"]["scores"]["exact"]["right"]
    assert [(x["id"], x["answer"], x["exact"]) for x in found[-1]["answers"]] == wanted
    log = (tmp_path / "asked.log").read_text()
    assert f"{right} of 6 answers right" in log and f"{wanted[0][0]}: " in log
    measured = [x for x in metrics(asked) if "exact" in x]
    assert [(x["step"], x["examined"]) for x in measured] == [(0, 6), (2, 6), (4, 6)]
    assert measured[-1]["exact"] == right / 6
    page = (asked / "run.html").read_text()
    assert page.count("data:image/jpeg") == page.count('<article class="card') == 6 and "step 4" in page
    assert {"gates/attn_gate", "memory", "tokens_per_second"} <= set(metrics(asked)[-2])
    assert not (plain / "answers.jsonl").exists() and "<svg" in (plain / "run.html").read_text()


@pytest.mark.matrix
def test_a_resumed_run_goes_on_with_its_page(vlm: Any, train: Any, held_out: Any, monkeypatch: Any) -> None:
    flags = ("--max-steps", 6, *held_out, "--eval-answers", 3, "--best", "loss")
    whole = train("whole", *flags)

    def stop(self: Any, entries: Any, *arguments: Any, **keywords: Any) -> None:
        if entries[-1]["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunPage, "update", stop)
        with pytest.raises(AssertionError, match="checkpoint-4 is kept"):
            train("again", *flags)
    again = train("again", *flags, "--resume")
    assert answers(again) == answers(whole) and are_equal(weights(again), weights(whole))
    assert json.loads((again / "training_args.json").read_text())["result"]["resumed_from"] == 4


@pytest.mark.matrix
@pytest.mark.parametrize("measure", ["loss", pytest.param("score", marks=pytest.mark.matrix)])
def test_the_best_checkpoint_becomes_the_output(train: Any, held_out: Any, measure: str, monkeypatch: Any) -> None:
    """The measurements are made up, so that the best step is in the middle."""
    from vlm_cli.training.trainer import VLMTrainer

    values = {0: 0.0, 2: 3.0, 4: 1.0, 6: 2.0}
    measured = {"loss": "eval_loss", "score": "exact"}[measure]
    original = VLMTrainer._measure_held_out

    def pretend(self: Any) -> dict[str, float]:
        value = values[self.state.global_step]
        return original(self) | ({"eval_loss": value} if measure == "loss" else {})

    monkeypatch.setattr(VLMTrainer, "_measure_held_out", pretend)
    if measure == "score":
        monkeypatch.setattr(VLMTrainer, "_examine", lambda self: {measured: 4 - values[self.state.global_step]})
    asks = ("--eval-answers", 1) if measure == "score" else ()
    best = train("best", "--max-steps", 6, "--schedule", "constant", *held_out, *asks, "--best", measure)
    last = train("last", "--max-steps", 6, "--schedule", "constant", "--keep-checkpoints")
    four, six = (load_file(last.parent / f"last.checkpoints/checkpoint-{n}/model.safetensors") for n in (4, 6))
    assert are_equal(four, weights(best)) and not are_equal(six, weights(best))
    assert are_equal(six, weights(last))
    result = json.loads((best / "training_args.json").read_text())["result"]
    assert result["best_step"] == 4 and result["steps"] == 6
    if measure == "loss":
        assert result["eval_loss"] == 1.0


def test_equal_scores_are_told_apart_by_their_loss(tmp_path: Path) -> None:
    entries = [
        {"step": s, "exact": e, "eval_loss": x} for s, e, x in ((0, 1, 0), (2, 0.5, 2), (4, 0.5, 1), (6, 0.2, 0))
    ]
    assert BestWeights(tmp_path, "score").find_step(entries) == 4
    assert BestWeights(tmp_path, "loss").find_step(entries) == 6
    assert BestWeights(tmp_path, "loss").find_step(entries[:1]) is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--eval-answers", "2"], "Add --eval-data FILE"),
        (["--best", "loss"], "--best compares held-out records, and none are given. Add --eval-data FILE."),
        (["--eval-data", "DATA", "--best", "score"], "Add --eval-answers N"),
        (["--best", "los"], "unknown best 'los'. Did you mean 'loss'?"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    vlm: Any, folder: Path, cross_attention: Path, flags: Any, problem: str
) -> None:
    data = folder / "train.jsonl"
    given = [data if flag == "DATA" else flag for flag in flags]
    result = vlm("train", cross_attention, "-d", data, "-o", folder / "none", *given)
    assert result.exit_code == 2 and problem in result.stderr
    assert not (folder / "none").exists()


def test_an_evaluation_and_a_checkpoint_ask_alike() -> None:
    assert QuestionOptions.max_new_tokens == MAX_NEW_TOKENS


def test_random_numbers_go_on_as_if_the_block_were_not_there() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with preserved_randomness():
        assert draw() == wanted
    assert draw() == wanted != draw()


# -- the page ----------------------------------------------------------------------------------------------------------


def make_page(num_steps: int = 50, *, progress: float | None = None, text: str = "a cat") -> str:
    entries: list[dict[str, Any]] = [
        {"step": i, "loss": 1 / (i + 1), "learning_rate": 1e-4, "images_per_second": 3.0, "gates/attn_gate": 0.1}
        for i in range(1, num_steps)
    ]
    entries += [{"step": num_steps, "eval_loss": 0.5, "exact": 0.25, "examined": 4}, {"step": 1, "loss": float("nan")}]
    asked = [Question(text, text, text, ("data:image/jpeg;base64,AA==",))]
    said = [Examination([ExaminedAnswer(text, text, i % 2 == 0)], i) for i in range(0, num_steps, 10)]
    return format_run_page(text, {"model": text}, entries, asked, said, progress=progress)


def test_a_page_needs_no_other_file_and_runs_nothing() -> None:
    page = make_page(text="<script>alert(1)</script><img src=http://a.b/c>\0")
    assert "<script" not in page and "&lt;script&gt;" in page and "\0" not in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert 'http-equiv="refresh"' not in page and "<progress" not in page
    running = make_page(progress=0.25)
    assert 'http-equiv="refresh" content="30"' in running and '<progress value="0.2500"' in running


def test_curves_have_the_places_of_their_points() -> None:
    page = make_page()
    figures = re.findall(r"<figcaption>([^<]+)", page)
    assert figures == ["Loss per token", "Right answers (% of held-out questions)", "Learning rate",
                       "Opening of the gates (mean of |tanh|)", "Images (per second)"]  # fmt: skip
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', page)[0].split()]
    assert len(points) == 49 and points == sorted(points)
    assert points[0][1] < points[-1][1]  # the loss falls, and the axis of a drawing points down
    assert "nan" not in page


def test_a_page_of_a_long_run_is_small() -> None:
    assert len(make_page(20_000)) < 200_000 < len(make_page(20)) * 40


# -- the time that is left ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [10, 37, 500])
@pytest.mark.parametrize("evaluation", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("resumed", [0, 300])
def test_the_time_left_is_right_after_a_twentieth_of_the_run(
    monkeypatch: pytest.MonkeyPatch, every: int, evaluation: float, resumed: int
) -> None:
    """A slow first step, even steps, and pauses whose length is known from one before the first step."""
    now = 0.0
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now)
    budget = RunBudget(400, None, pause_every=every)
    budget.continue_from(resumed, 1000.0 * bool(resumed))
    budget.start()
    with budget.pause("eval"):
        now += evaluation
    predicted = {}
    for step in range(resumed + 1, 401):
        now += 8.0 if step == resumed + 1 else 0.5
        budget.note_step(step)
        predicted[step] = now + budget.seconds_left(step)
        if step % every == 0 or step == 400:
            with budget.pause("eval"):
                now += evaluation
    for step in range(resumed + max(2, (400 - resumed) // 20), 401):
        assert abs(predicted[step] - now) <= 0.1 * now, step
