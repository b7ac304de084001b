"""The whole recipe: draw data, train the vision encoder, compose two models, train and question each.

    OUT/data/                          records to learn
    OUT/questions/NAME/                records to be asked, for each NAME of `EVALUATIONS`
    OUT/vision/, OUT/language/         parts, for `vlm build`
    OUT/start/demo/, …                 what `vlm build` wrote
    OUT/demo/, OUT/demo-flamingo/      what `vlm train` wrote, and `recipe.md`: settings, versions, results
    OUT/answers/                       what each model answered
    OUT/log.txt                        all commands and what they said

A step whose result is there is not repeated, and a training that was cut goes on: give the same command again.

Example: python -m examples.scenes.train OUT --minutes 60
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from examples.scenes.texts import QUESTION_KINDS

__all__ = ["COMPOSITIONS", "EVALUATIONS", "Recipe", "follow", "make_table", "open_gates"]

ROOT = Path(__file__).resolve().parents[2]

_SETTINGS = (
    *("vision_tokenizer.num_latents=16", "vision_tokenizer.depth=2"),
    *(f"{part}.{size}" for part in ("vision_tokenizer", "fusion") for size in ("num_heads=4", "head_dim=32")),
)
#: Flags of `vlm build` that differ.
COMPOSITIONS: dict[str, tuple[str, ...]] = {
    "demo": ("--vision-tokenizer", "linear", "--fusion", "language-stream"),
    "demo-flamingo": (
        *("--vision-tokenizer", "perceiver", "--fusion", "cross-attention"),
        *(flag for setting in _SETTINGS for flag in ("--set", setting)),
    ),
}
GATE = 0.5  # where gates start, before tanh: closed ones would at first let nothing of a picture through
WEIGHT_DECAY = 0.05
WARMUP = 60  # steps
SHORT = 3.0  # minutes of training; below, the warmup is a tenth of them
RECORDS_PER_MINUTE = 2500  # more than two processors can learn once
VISION_SHARE = 0.3  # of the minutes; the compositions have the rest in equal parts
SECOND_SEED = 1  # added to the seed for what is asked, so that no scene was learned

#: Records to be asked: flags of `python -m examples.scenes`, and what the report says of them.
EVALUATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "held-out": (("--split", "held-out"), "scenes with a combination that training never shows"),
    "unseen": (("--split", "train", "--form", "single"), "new scenes of the combinations that training shows"),
    "wrong-image": (
        ("--split", "held-out", "--wrong-image"),
        "the questions of held-out, each about another scene's picture: what can be guessed",
    ),
}
#: Rows of the report that are no kind of their own.
GROUPS = {"captions": lambda kind: kind.startswith("caption-"), "questions": lambda kind: kind in QUESTION_KINDS}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a run."""

    minutes: float = 60.0  # of training, without data and questions
    num_train: int = 40_000  # records to learn
    num_questions: int = 2_400  # records of each evaluation
    seed: int = 0  # of everything
    batch_size: int = 24  # records
    learning_rate: float = 2e-3  # of Muon and AdamW, at its highest
    bf16: bool = True  # multiply matrices in bfloat16
    dtype: str = "bfloat16"  # of the weights that are kept
    threads: int | None = None  # of each process; None is torch's choice
    names: tuple[str, ...] = tuple(COMPOSITIONS)

    @property
    def vision_minutes(self) -> float:
        return self.minutes * VISION_SHARE

    @property
    def composition_minutes(self) -> float:
        return self.minutes * (1 - VISION_SHARE) / len(self.names)


class Workshop:
    """The folder in which a recipe is followed.

    Commands run there with relative names, so that no file that they write holds the path of this machine.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if threads is not None:
            self.environment["OMP_NUM_THREADS"] = str(threads)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def run(self, module: str, *arguments: object) -> str:
        """Run a module; what it says goes to the log as it comes, what it prints is returned.

        Raises:
            SystemExit: if it fails.
        """
        command = ["-m", module, *map(str, arguments)]
        self.say(f"$ python {shlex.join(command)}")
        start = time.monotonic()
        with TemporaryFile("w+", encoding="utf-8") as printed:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env=self.environment,
                stdout=printed,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert process.stderr is not None
            for line in process.stderr:
                self.say("  " + line.rstrip())
            if process.wait():
                raise SystemExit(f"Error: the last command failed; {self.folder / 'log.txt'} has all that it said.")
            self.say(f"  {time.monotonic() - start:.0f} s")
            printed.seek(0)
            return printed.read()


def follow(recipe: Recipe, folder: Path) -> None:
    """Follow the recipe from wherever it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    shop = Workshop(folder.resolve(), recipe.threads)
    draw_scenes(shop, recipe)
    make_parts(shop, recipe)
    for name in recipe.names:
        compose(shop, recipe, name)
        train(shop, recipe, name)
        question(shop, name)
        report(shop, recipe, name)


def draw_scenes(shop: Workshop, recipe: Recipe) -> None:
    workers = ("--workers", recipe.threads or os.cpu_count() or 1)
    if not shop.has("data/data.jsonl"):
        shop.run("examples.scenes", "data", "--num", recipe.num_train, "--seed", recipe.seed, *workers)
    for name, (flags, _) in EVALUATIONS.items():
        if not shop.has(f"questions/{name}/data.jsonl"):
            number, seed = recipe.num_questions, recipe.seed + SECOND_SEED
            shop.run("examples.scenes", f"questions/{name}", *flags, "--num", number, "--seed", seed)


def make_parts(shop: Workshop, recipe: Recipe) -> None:
    if not shop.has("vision/open_clip_model.safetensors"):
        bf16 = ["--bf16"] if recipe.bf16 else []
        minutes = f"{recipe.vision_minutes:g}"
        shop.run("examples.scenes.vision", "vision", "--minutes", minutes, "--seed", recipe.seed, *bf16)
    if not shop.has("language/model.safetensors"):
        shop.run("examples.scenes.language", "language", "--seed", recipe.seed)


def compose(shop: Workshop, recipe: Recipe, name: str) -> None:
    """Everything trains but the vision encoder, which later training would only damage."""
    out = f"start/{name}"
    if shop.has(out):
        return
    (shop.folder / "start").mkdir(exist_ok=True)
    parts = ("--vision-encoder", "local-dir:vision", "--language-model", "language", *COMPOSITIONS[name])
    trainable = "vision_tokenizer,fusion,added_tokens,language_model"
    more = ("--trainable", trainable, "--set", f"weight_decay={WEIGHT_DECAY}", "--seed", recipe.seed)
    shop.run("vlm_cli", "build", f"{out}.closed", *parts, *more)
    open_gates(shop.folder / f"{out}.closed")
    (shop.folder / f"{out}.closed").rename(shop.folder / out)


def open_gates(folder: Path, value: float = GATE) -> int:
    """Set all gates of a model's directory to a value; return how many there are."""
    from safetensors.torch import load_file, save_file

    from vlm_cli.manifest import sign
    from vlm_cli.modeling.fusion.gates import is_gate

    path = folder / "model.safetensors"
    tensors = load_file(path)
    gates = [name for name in tensors if is_gate(name)]
    for name in gates:
        tensors[name].fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})
    sign(folder)  # the manifest holds the hash of the closed gates
    return len(gates)


def train(shop: Workshop, recipe: Recipe, name: str) -> None:
    if shop.has(name):
        return
    minutes = f"{recipe.composition_minutes:g}"
    flags = ["--data", "data/data.jsonl", "--output", name, "--max-minutes", minutes, "--optimizer", "muon"]
    flags += ["--learning-rate", f"{recipe.learning_rate:g}", "--batch-size", str(recipe.batch_size)]
    flags += [
        "--warmup-steps",
        "0.1" if recipe.composition_minutes < SHORT else str(WARMUP),
        "--seed",
        str(recipe.seed),
    ]
    flags += ["--dtype", recipe.dtype, "--log-every", "50", *(["--bf16"] if recipe.bf16 else [])]
    flags += ["--resume"] if shop.has(f"{name}.checkpoints") else []
    shop.run("vlm_cli", "train", f"start/{name}", *flags)


def question(shop: Workshop, name: str) -> None:
    (shop.folder / "answers").mkdir(exist_ok=True)
    for asked in EVALUATIONS:
        path = shop.folder / "answers" / f"{name}.{asked}.json"
        if not path.exists():
            printed = shop.run("vlm_cli", "eval", name, "--data", f"questions/{asked}/data.jsonl", "--json")
            path.write_text(printed, encoding="utf-8")


# -- the report -------------------------------------------------------------------------------------------------------


def report(shop: Workshop, recipe: Recipe, name: str) -> None:
    """Write what was done and what came of it, beside the weights."""
    answers = {
        asked: [_shorten(kind) for kind in json.loads(path.read_text(encoding="utf-8"))["kinds"]]
        for asked in EVALUATIONS
        for path in [shop.folder / "answers" / f"{name}.{asked}.json"]
    }
    settings = asdict(recipe) | {"names": [name]}
    facts = {"recipe": settings, "versions": versions(), "machine": machine(), "results": answers}
    (shop.folder / name / "recipe.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.copy(shop.folder / "vision" / "metrics.jsonl", shop.folder / name / "vision_metrics.jsonl")
    table = make_table(answers)
    (shop.folder / name / "recipe.md").write_text(write_report(name, facts, table), encoding="utf-8")
    shop.say(table)


def _shorten(kind: dict[str, Any]) -> dict[str, Any]:
    """Keep of a kind's score what the report shows."""
    exact = kind["scores"]["exact"]
    counts = {"kind": kind["kind"], "items": kind["items"], "exact": exact["right"]}
    return {**counts, "share": exact["value"], "interval": exact["interval"]}


def make_table(answers: dict[str, list[dict[str, Any]]]) -> str:
    """Exact answers of each kind, in Markdown."""
    kinds = dict.fromkeys(score["kind"] for scores in answers.values() for score in scores)
    rows = {kind: {kind} for kind in sorted(kinds)}
    rows |= {f"**{title}**": {kind for kind in kinds if belongs(kind)} for title, belongs in GROUPS.items()}
    lines = ["| exact answers | " + " | ".join(answers) + " |", "|---|" + "---|" * len(answers)]
    for title, members in rows.items():
        cells = [_cell([score for score in scores if score["kind"] in members]) for scores in answers.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(scores: Sequence[dict[str, Any]]) -> str:
    items, exact = (sum(score[key] for score in scores) for key in ("items", "exact"))
    return f"{100 * exact / items:.1f} % of {items}" if items else "none asked"


def write_report(name: str, facts: dict[str, Any], table: str) -> str:
    meanings = "\n".join(f"- {asked}: {meaning}" for asked, (_, meaning) in EVALUATIONS.items())
    lines = [f"- {key}: {value}" for part in ("recipe", "versions", "machine") for key, value in facts[part].items()]
    return (
        f"# How `{name}` was made\n\n`python -m examples.scenes.train`, of the package's repository. Synthetic scenes "
        f"only: about a photo it says something confident and wrong.\n\n{table}\n\n{meanings}\n\n"
        + "\n".join(lines)
        + "\n"
    )


def versions() -> dict[str, str]:
    packages = ("vlm-cli", "torch", "transformers", "open_clip_torch", "pillow", "numpy")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def machine() -> dict[str, Any]:
    return {"system": f"{platform.system()} {platform.machine()}", "processors": os.cpu_count()}


def main() -> None:
    default = Recipe()
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.train", description="Make the demo models.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Directory to work in; give it again to go on.")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="Of training; 3 is a rehearsal.")
    parser.add_argument("--num-train", type=int, help="Records to learn; default: what the minutes allow.")
    parser.add_argument("--num-questions", type=int, default=default.num_questions, help="Of each evaluation.")
    parser.add_argument("--only", choices=tuple(COMPOSITIONS), help="Make one of the two models.")
    parser.add_argument("--seed", type=int, default=default.seed, help="Of everything.")
    parser.add_argument("--threads", type=int, help="Threads of torch.")
    parser.add_argument("--no-bf16", action="store_true", help="Multiply in float32, for processors without bfloat16.")
    parser.add_argument("--dtype", default=default.dtype, help="Of the weights that are kept.")
    args = parser.parse_args()
    names = (args.only,) if args.only else default.names
    enough = max(500, round(args.minutes / len(names) * RECORDS_PER_MINUTE))
    recipe = Recipe(
        minutes=args.minutes,
        num_train=args.num_train or min(default.num_train, enough),
        num_questions=args.num_questions,
        seed=args.seed,
        bf16=not args.no_bf16,
        dtype=args.dtype,
        threads=args.threads,
        names=names,
    )
    follow(recipe, args.out)


if __name__ == "__main__":
    main()
