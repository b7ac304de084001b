"""How fast `vlm generate --batch` answers many prompts over few images, next to one after the other.

python -m benchmarks.speed.batch
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vlm_cli
from benchmarks.speed.measure import Run, Skipped, Subject, compare, seconds
from benchmarks.speed.models import FIRST_WORD, Models
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report

TOKENS, TOKENS_ON_GPU = 8, 64  # new tokens of an answer
ONE_BY_ONE = "model.generate, one by one"


def measure(report: Report, models: Models, settings: Settings) -> None:
    """Both load the model first, in this process, so that nothing is imported on the clock."""
    if models.device != "cpu":
        _measure_on_gpu(report, models, settings)
        return
    size = models.size.name
    prompts, images = (8, 2) if size == "tiny" else (64, 16)
    records = write_prompts(models, prompts, images)
    folder, output = models.directory("llava"), models.scratch / "answers.jsonl"
    texts: list[str] = []
    peer = Subject(ONE_BY_ONE, lambda: seconds(lambda: texts.__setitem__(slice(None), one_by_one(folder, records))))
    prompts_file = models.scratch / "prompts.jsonl"
    ours = Subject("vlm generate --batch", lambda: _in_batches(folder, prompts_file, output, TOKENS))
    case = f"{prompts} prompts over {images} images, {TOKENS} new tokens"
    try:
        report.add(size, case, ours.name, compare(ours, [peer], settings.few, warm_up=size == "tiny"))
    except Skipped as reason:
        report.add(size, case, ours.name, {ONE_BY_ONE: reason})
    if output.exists():
        answers = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
        # An answer of `vlm` keeps the blank that joins it to its prompt.
        equal = sum(a.lstrip() == b for a, b in zip(answers, texts, strict=True))
        report.notes.append(f"{size}: {equal} of {prompts} answers are equal to those one by one.")
    if size == "standard":
        ratio = report.ratio(case, ours.name, ONE_BY_ONE, size)
        value = None if ratio is None else 1 / ratio
        report.bars.append(Bar(name=f"batch, {case}: speed / one by one", value=value, limit=3, sense="at least"))


def _measure_on_gpu(report: Report, models: Models, settings: Settings) -> None:
    """The batch size that the run finds by itself, next to fixed ones; the loading of the model is in both."""
    prompts, images = (8, 2) if models.size.name == "tiny" else (512, 64)
    write_prompts(models, prompts, images)
    folder, output = models.directory("llava"), models.scratch / "answers.jsonl"
    where = ["--device", models.device, "--dtype", settings.dtype]

    def subject(*flags: str) -> Subject:
        file = models.scratch / "prompts.jsonl"
        return Subject(
            " ".join(["vlm batch", *flags]),
            lambda: _in_batches(folder, file, output, TOKENS_ON_GPU, *where, *flags),
        )

    case = f"{prompts} prompts over {images} images, {TOKENS_ON_GPU} new tokens"
    peers = [subject("--batch-size", str(rows)) for rows in (16, 64, 256)]
    report.add(models.size.name, case, "vlm batch", compare(subject(), peers, min(settings.pairs, 1), warm_up=False))


def write_prompts(models: Models, prompts: int, images: int) -> list[dict[str, Any]]:
    """`prompts.jsonl` and its images in the scratch folder; each image stands in as many prompts."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    for i in range(images):
        pixels = noise.integers(0, 256, (models.image_size, models.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(models.scratch / f"{i}.png")
    records = []
    for i in range(prompts):
        words = " ".join(f"w{draw.randrange(FIRST_WORD, models.vocabulary)}" for _ in range(draw.randint(6, 12)))
        records.append({"prompt": f"<image:{models.scratch / f'{i % images}.png'}>{words}", "id": i})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (models.scratch / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return records


def one_by_one(folder: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    """The loop that one would write in Python."""
    model, processor = vlm_cli.load(str(folder))
    texts = []
    for record in records:
        file, _, words = record["prompt"].removeprefix("<image:").partition(">")
        with Image.open(file) as image:
            inputs = processor(text=f"<image>{words}", images=[image.convert("RGB")])
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        texts.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def _in_batches(folder: Path, prompts: Path, output: Path, tokens: int, *flags: str) -> Run:
    """The command, called in this process.

    Raises:
        Skipped: if it has no --batch.
    """
    from vlm_cli.cli.app import app

    words = ["generate", "--model", str(folder), "--batch", str(prompts), "--output", str(output)]
    words += ["--max-new-tokens", str(tokens), "--temperature", "0", *flags]

    def command() -> None:
        output.unlink(missing_ok=True)
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = app(words, standalone_mode=False)
        if code or not output.exists():
            raise Skipped(f"vlm generate --batch ended with {code}")

    return seconds(command)


QUESTION = Question(
    name="batch",
    asks="How fast are many prompts over few images, with `vlm generate --batch` and one by one?",
    measure=measure,
    sizes=("tiny", "small", "standard", "large"),
)

if __name__ == "__main__":
    run(QUESTION)
