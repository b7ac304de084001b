"""All questions, each in a process of its own, and one page of what they found.

python -m benchmarks.speed           minutes; writes benchmarks/results/DATE.md and a JSON file for each question
python -m benchmarks.speed --quick   tiny models, to try the scripts
python -m benchmarks.speed --size large --device cuda --dtype bfloat16   what a GPU is asked
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import typer

from benchmarks.speed.question import Settings, command
from benchmarks.speed.results import Report, bars_table, page

QUESTIONS = ("startup", "encode", "prefill", "decode", "steps", "train_step", "training", "memory", "growth", "batch")
QUESTIONS += ("batch_goals", "clip")


def asked(device: str) -> list[str]:
    """The questions that are asked on a device."""
    kind = device.partition(":")[0]
    return [name for name in QUESTIONS if kind in import_module(f"benchmarks.speed.{name}").QUESTION.devices]


def main(settings: Settings) -> None:
    reports, failed = [], []
    for name in asked(settings.device):
        print(f"{name} …", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.speed.{name}", *settings.flags()], stdout=sys.stderr)
        if done.returncode:
            failed.append(name)
            continue
        data = json.loads((settings.out / f"{settings.name}-{name}.json").read_text(encoding="utf-8"))
        reports.append(Report.from_dict(data))
    words = " ".join(["python", "-m", "benchmarks.speed", *settings.flags(paths=False)])
    path = settings.out / f"{settings.name}.md"
    path.write_text(page(reports, words, failed), encoding="utf-8")
    print(bars_table([bar for report in reports for bar in report.bars]))
    print(f"{path}, {sum(report.seconds for report in reports) / 60:.0f} minutes")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(command(main, "Answer all questions, and write a page."))
