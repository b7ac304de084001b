"""One run of a sweep: a composition and a seed, the folder that it has, and the commands that make it.

OUT/runs/linear-language-stream-0-1f0c…/
    composition.yaml    for `vlm build`
    run.json            what the run is: values, seed, settings, hashes of the data
    commands.sh         the commands, one a line
    log.txt             what they said
    start/              the model before training; removed after it, unless adapters need it
    trained/            the model after it
    answers-1b2f….jsonl, scores-1b2f….json    of the questions with this hash
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_cli.files import is_vlm_directory, replacing_file
from vlm_cli.flags import spell_settings
from vlm_cli.plain_data import read_json
from vlm_cli.sweeps.candidates import Candidate, digest
from vlm_cli.sweeps.plan import QUESTIONS, READING, Plan
from vlm_cli.training.settings import TrainingSettings

__all__ = ["RUNS", "Run", "make_runs"]

RUNS = "runs"  # the folder of runs in the results
_MOST_NAME = 60  # characters of a run's name, its hash aside


@dataclass(frozen=True)
class Run:
    """A candidate with a seed.

    Attributes:
        candidate: the composition, and how it trains.
        seed: of its random weights, and of the order of the records.
        plan: the sweep.
        folder: of the run.
        hashes: of the data to learn, by source.
        questions: a hash of what is asked and how it is marked.
        trusts: whether the language model's own code may run.
    """

    candidate: Candidate
    seed: int
    plan: Plan
    folder: Path
    hashes: dict[str, str]
    questions: str
    trusts: bool = False

    @property
    def name(self) -> str:
        """What messages call the run."""
        return f"{self.candidate.label}, seed {self.seed}"

    @property
    def trained(self) -> Path:
        """The directory of the trained model."""
        return self.folder / "trained"

    @property
    def start(self) -> Path:
        """The directory of the model before training."""
        return self.folder / "start"

    @property
    def log(self) -> Path:
        """The file of what the commands said."""
        return self.folder / "log.txt"

    @property
    def answers(self) -> Path:
        """The file of answers to the questions."""
        return self.folder / f"answers-{self.questions}.jsonl"

    @property
    def scores(self) -> Path:
        """What `vlm eval --json` printed; the run is complete if it is there."""
        return self.folder / f"scores-{self.questions}.json"

    @property
    def is_trained(self) -> bool:
        """Whether its model is written."""
        return is_vlm_directory(self.trained)

    @property
    def is_complete(self) -> bool:
        """Whether its questions are answered."""
        return self.scores.is_file() and self.answers.is_file()

    @property
    def settings(self) -> TrainingSettings:
        """How it trains."""
        return dataclasses.replace(self.candidate.settings, seed=self.seed)

    @property
    def build_words(self) -> list[str]:
        """The words of `vlm build`."""
        config = ["--config", str(self.folder / "composition.yaml"), "--seed", str(self.seed)]
        return ["build", str(self.start), *config, *self._trust]

    @property
    def train_words(self) -> list[str]:
        """The words of `vlm train`, which goes on from a checkpoint if there is one."""
        plan = self.plan
        data = [word for source in plan.data for word in ("--data", source)]
        weights = [] if plan.weights is None else ["--weights", ",".join(map(str, plan.weights))]
        how = [*plan.words(READING), *spell_settings(self.settings), *self._trust]
        return ["train", str(self.start), *data, *weights, "--output", str(self.trained), *how, "--resume"]

    @property
    def eval_words(self) -> list[str]:
        """The words of `vlm eval`."""
        settings = self.settings
        shown = ["--chat-template", settings.chat_template] if settings.chat_template != "auto" else []
        shown += ["--special-tokens"] if settings.special_tokens else []
        shown += ["--device", settings.device] if settings.device != "auto" else []
        asked = ["--data", self.plan.eval_data, *self.plan.words([*QUESTIONS, *READING]), *shown, *self._trust]
        return ["eval", str(self.trained), *asked, "--output", str(self.answers), "--overwrite", "--json"]

    @property
    def _trust(self) -> list[str]:
        return ["--trust-remote-code"] if self.trusts else []

    def describe(self) -> dict[str, Any]:
        """Return what the run is, as `run.json` holds it."""
        assert self.candidate.composition is not None
        return {
            "values": dict(self.candidate.values),
            "seed": self.seed,
            "composition": self.candidate.composition.to_dict(),
            "training": self.settings.to_dict(),
            "data": self.hashes,
        }

    def prepare(self) -> None:
        """Write the files that say what the run is.

        Raises:
            VLMError: if they cannot be written.
            OSError: if the folder cannot be made.
        """
        assert self.candidate.composition is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        commands = [shlex.join(["vlm", *x]) for x in (self.build_words, self.train_words)]
        answers = f"{shlex.join(['vlm', *self.eval_words])} > {shlex.quote(str(self.scores))}"
        script = "# In the folder in which `vlm sweep` was started:\n" + "\n".join([*commands, answers]) + "\n"
        files = {
            "composition.yaml": yaml.safe_dump(self.candidate.composition.to_dict(), sort_keys=False),
            "run.json": json.dumps(self.describe(), indent=2) + "\n",
            "commands.sh": script,
        }
        for name, text in files.items():
            with replacing_file(self.folder / name, overwrite=True) as file:
                file.write(text)

    def read_training(self) -> dict[str, Any]:
        """Return the result of the training: steps, seconds, loss; empty if there is none yet."""
        try:
            found = read_json(self.trained / "training_args.json")["result"]
            return {key: found[key] for key in ("steps", "images", "seconds", "loss", "images_per_second")}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def make_runs(
    plan: Plan,
    candidates: list[Candidate],
    out: Path,
    hashes: dict[str, str],
    questions: str,
    *,
    trusts: bool = False,
) -> list[Run]:
    """Return the runs of all candidates that are possible and not the same as another one, seed by seed.

    Args:
        plan: the sweep.
        candidates: of its grid.
        out: the folder of its results.
        hashes: of the data to learn.
        questions: a hash of what is asked.
        trusts: whether the language model's own code may run.
    """
    runs = []
    for seed in plan.seeds:
        for candidate in candidates:
            if candidate.problem is None and candidate.same_as is None:
                identity = digest([candidate.identity, seed, hashes, plan.weights, plan.reading.to_dict()])
                name = f"{_slug(candidate.label)}-{seed}-{identity}"
                runs.append(Run(candidate, seed, plan, out / RUNS / name, hashes, questions, trusts))
    return runs


def _slug(text: str) -> str:
    """Turn words into part of a file's name.

    >>> _slug("perceiver(depth=2), language-stream")
    'perceiver-depth-2-language-stream'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:_MOST_NAME] or "base"
