"""Where the time of `vlm batch` goes, and whether it meets its goals: by what the runs tell of themselves.

python -m benchmarks.speed.batch_goals --size large --device cuda --dtype bfloat16
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import torch

from benchmarks.speed.batch import write_prompts
from benchmarks.speed.measure import Skipped, seconds
from benchmarks.speed.models import Models, Prompt, greedy
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report, Table

FIXED = (16, 64, 256)  # rows at once that a user may give
LOOPS = (16, 64)  # rows at once of the peer's loop
BEFORE = 1_888  # tokens/s of `--batch-size 64` on one H100, before rows made room for others
TOLD = ("tokens_per_second", "batch_size", "positions_decoded", "waiting_share", "outside_share", "seconds")


def measure(report: Report, models: Models, settings: Settings) -> None:
    """Each run loads the model, which its own numbers leave out. The first run warms up."""
    prompts, images, tokens = (24, 2, 8) if models.size.name == "tiny" else (512, 64, 64)
    write_prompts(models, prompts, images)
    where = ["--device", models.device, "--dtype", settings.dtype]
    tell(models, tokens, *where)
    runs = {"vlm batch": tell(models, tokens, *where)}
    for rows in FIXED:
        runs[f"vlm batch --batch-size {rows}"] = tell(models, tokens, *where, "--batch-size", str(rows))
    cells = [[name, *(f"{told[key]:g}" for key in TOLD)] for name, told in runs.items()]
    loops: list[float] = []
    for rows in LOOPS:
        try:
            speed = loop(models, prompts, rows, tokens)
        except Skipped as reason:
            cells.append([f"HF LLaVA, {rows} rows", str(reason), *[""] * (len(TOLD) - 1)])
        else:
            loops.append(speed)
            cells.append([f"HF LLaVA, {rows} rows", f"{speed:g}", *[""] * (len(TOLD) - 1)])
    title = f"{models.size.name}: {prompts} prompts over {images} images, {tokens} new tokens, without loading"
    report.tables.append(Table(title, ["run", *(key.replace("_", " ") for key in TOLD)], cells))
    report.bars += bars(models.size.name, runs, loops)


def bars(size: str, runs: dict[str, dict[str, Any]], loops: list[float]) -> list[Bar]:
    """What is asked of the run that finds its batch size, on the card of the goals; elsewhere it is only told."""
    found, *fixed = runs.values()
    speed, best = found["tokens_per_second"], max(told["tokens_per_second"] for told in fixed)
    is_asked = size == "large" and torch.cuda.is_available()

    def bar(name: str, value: float | None, limit: float, sense: Any = "at most") -> Bar:
        return Bar(name=f"batch, {size}: {name}", value=value, limit=limit if is_asked else None, sense=sense)

    return [
        bar("tokens/s", speed, 5 * BEFORE, "at least"),
        bar("share of the time outside of the model", found["outside_share"], 0.05),
        bar("share of the time waiting for rows and pictures", found["waiting_share"], 0.02),
        bar("speed / that of the best fixed size", speed / best, 0.9, "at least"),
        bar("speed / that of HF LLaVA's best loop", speed / max(loops) if loops else None, 1.0, "at least"),
    ]


def tell(models: Models, tokens: int, *flags: str) -> dict[str, Any]:
    """What a run of the command says of itself with --json."""
    from vlm_cli.cli.app import app

    output = models.scratch / "answers.jsonl"
    output.unlink(missing_ok=True)
    words = ["batch", str(models.scratch / "prompts.jsonl"), "--model", str(models.directory("llava"))]
    words += ["--output", str(output), "--max-new-tokens", str(tokens), "--temperature", "0", "--json", *flags]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
        app(words, standalone_mode=False)
    found: dict[str, Any] = json.loads(told.getvalue())
    return found


def loop(models: Models, prompts: int, rows: int, tokens: int) -> float:
    """Tokens per second of a loop over Transformers' LLaVA: fixed batches, pixels at hand.

    Raises:
        Skipped: if it is not at hand.
    """
    peer = models.peer("llava", "llava")
    inputs = peer.inputs(Prompt(1, batch=rows, text=9))

    @torch.inference_mode()
    def answer() -> None:
        for _ in range(0, prompts, rows):
            peer.model.generate(**inputs, **greedy(tokens))

    answer()
    batches = -(-prompts // rows)
    return batches * rows * tokens / seconds(answer)()


QUESTION = Question(
    name="batch_goals",
    asks="Where does the time of `vlm batch` go, next to fixed batch sizes and a loop over HF LLaVA?",
    measure=measure,
    sizes=("tiny", "large"),
    devices=("cuda",),
)

if __name__ == "__main__":
    run(QUESTION)
