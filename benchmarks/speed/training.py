"""How fast a run of training is: whole steps, from the files of pictures to the optimizer.

python -m benchmarks.speed.training
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.speed.measure import Pairs, Run, Subject, compare
from benchmarks.speed.models import FIRST_WORD, Contender, Models
from benchmarks.speed.question import Question, Settings, run
from benchmarks.speed.results import Bar, Report
from vlm_cli.checkpoint.create import plan
from vlm_cli.modeling.batching import pad_left
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.training.checkpoints import Checkpoints, RunHistory
from vlm_cli.training.dataset import RecordDataset, load_dataset
from vlm_cli.training.features import FeatureCache
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.trainer import VLMTrainer
from vlm_cli.training.watching import Watching

PEER = "Transformers' Trainer, LlavaForConditionalGeneration"
UNPACKED, GROUPED = "one record a row, in random order", "one record a row, --group-by-length"
STEPS = 3  # of a run; the first is not counted
#: What trains: the parts of ours, and the modules of Transformers' model that are left frozen.
TRAINED = {
    "the projector trains": (("vision_tokenizer",), ("model.vision_tower", "model.language_model", "lm_head")),
    "all but the tower trains": (("vision_tokenizer", "language_model"), ("model.vision_tower",)),
}


def measure(report: Report, models: Models, settings: Settings) -> None:
    """Seconds are those of the processor, so that other programs of the machine change little."""
    is_tiny = models.size.name == "tiny"
    _against_transformers(report, models, settings, rows=2 if is_tiny else 16, words=16 if is_tiny else 128)
    _against_pixels(report, models, settings, rows=2 if is_tiny else 4)
    _against_padding(report, models, settings, rows=4)


# -- next to Transformers --------------------------------------------------------------------------------------------


def _against_transformers(report: Report, models: Models, settings: Settings, *, rows: int, words: int) -> None:
    """Equal rows: a picture and as many words, of which the model learns the second half."""
    size, ours = models.size.name, models.ours("llava")
    data = _records(models, ours, [(words // 2, words // 2)] * rows)
    for case, (parts, frozen) in TRAINED.items():
        subject = Subject("vlm train", partial(_our_steps, models, ours, data, parts, batch_size=rows))
        peer = Subject(PEER, partial(_their_steps, models, data, frozen, rows))
        outcome = compare(subject, [peer], settings.pairs)[PEER]
        case = f"{rows} rows of 1 image and {words} tokens, half of them learned; {case}"
        report.add(size, case, subject.name, {PEER: outcome}, unit="CPU s/step")
        if size == "small":
            ratio = outcome.ratio if isinstance(outcome, Pairs) else None
            report.bars.append(Bar(name=f"training, {case}: step / Transformers' step", value=ratio, limit=0.9))


def _their_steps(models: Models, data: RecordDataset, frozen: Sequence[str], batch_size: int) -> Run:
    peer = models.llava()
    model = peer.model.train()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    rows, clock = _RowsForTransformers(data, models), _Clock()
    arguments = TrainingArguments(
        output_dir=str(models.scratch / "theirs"),
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        learning_rate=1e-4,
        save_strategy="no",
        use_cpu=True,
        log_level="error",
        logging_steps=100,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )

    def once() -> float:
        trainer = Trainer(model, arguments, data_collator=rows.collate, train_dataset=rows, callbacks=[clock])
        trainer.train()
        return clock.per_step()

    return once


class _RowsForTransformers(Dataset[dict[str, Any]]):
    """The same records, read by the same code, as Transformers' LLaVA takes them: an id for each vision token."""

    def __init__(self, data: RecordDataset, models: Models) -> None:
        self.data, self.num_patches = data, models.num_patches
        self.image, self.media = models.vocabulary - 1, models.vocabulary

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        counts = torch.where(item["ids"] >= self.media, self.num_patches, 1)
        ids = item["ids"].masked_fill(item["ids"] >= self.media, self.image).repeat_interleave(counts)
        return {"ids": ids, "labels": item["labels"].repeat_interleave(counts), "pixels": item["pixels"]}

    @staticmethod
    def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids, mask = pad_left([item["ids"] for item in items], 0)
        labels, _ = pad_left([item["labels"] for item in items], IGNORED)
        pixels = torch.cat([medium.views for item in items for medium in item["pixels"]])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


# -- with features that are known ------------------------------------------------------------------------------------


def _against_pixels(report: Report, models: Models, settings: Settings, *, rows: int) -> None:
    """A step after `--cache-features` has written the features of all pictures, next to one that reads pixels."""
    ours = models.ours("llava")
    data = _records(models, ours, [(16, 32)] * rows)
    images = plan(ours.model.config.composition).processor.image_processor
    cache = FeatureCache.of(models.scratch / "features", ours.model, images, bf16=False)
    media = list(data.media_of(0))
    cache.fill(media, data.loaders[0], images, ours.model, device=torch.device("cpu"), tell=lambda message: None)
    parts = ("vision_tokenizer",)
    cached = partial(_our_steps, models, ours, replace(data, features=[cache]), parts, batch_size=rows)
    pixels = partial(_our_steps, models, ours, data, parts, batch_size=rows)
    outcome = compare(Subject("--cache-features", cached), [Subject("pixels", pixels)], settings.few)
    case = f"{rows} rows of 1 image and 48 tokens, 32 of them learned; the projector trains"
    report.add(models.size.name, case, "vlm train --cache-features", outcome, unit="CPU s/step")


# -- next to padding -------------------------------------------------------------------------------------------------


def _against_padding(report: Report, models: Models, settings: Settings, *, rows: int) -> None:
    """Records of mixed lengths, drawn at random: learned tokens of a processor second, packed and one record a row."""
    size, draw = models.size.name, random.Random(0)
    doublings = 2 if size == "tiny" else 6
    lengths = [(draw.randint(4, 12), int(4 * 2 ** draw.uniform(0, doublings))) for _ in range(40 * rows)]
    for family in ("llava", "flamingo"):
        ours = models.ours(family)
        data = _records(models, ours, lengths)
        longest = int(data.positions.max())
        length = 2 * longest
        parts = tuple(ours.model.config.composition.trainable)
        packs = max(1, rows * longest // length)  # as many positions in a batch as of the longest records

        def steps(parts: tuple[str, ...] = parts, ours: Contender = ours, data: Any = data, **settings: Any) -> Run:
            return _our_steps(models, ours, data, parts, per_token=True, **settings)

        packed = Subject(f"vlm train, {family}, --pack {length}", partial(steps, batch_size=packs, pack=length))
        peers = [
            Subject(name, partial(steps, batch_size=rows, group_by_length=grouped))
            for name, grouped in ((UNPACKED, False), (GROUPED, True))
        ]
        outcomes = compare(packed, peers, settings.few)
        case = f"records of 1 image and 8 to {longest} positions, {rows} rows or {packs} packs in a batch"
        report.add(size, case, packed.name, outcomes, unit="CPU s/learned token")
        if size == "small":
            outcome = outcomes[UNPACKED]
            value = 1 / outcome.ratio if isinstance(outcome, Pairs) else None
            name = f"training, {family}: learned tokens per second, packed / one record a row"
            report.bars.append(Bar(name=name, value=value, limit=1.5, sense="at least"))


# -- runs ------------------------------------------------------------------------------------------------------------


def _records(models: Models, ours: Contender, lengths: Sequence[tuple[int, int]]) -> RecordDataset:
    """Records with a picture, and so many words of prompt and of completion."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    for i in range(8):
        pixels = noise.integers(0, 256, (models.image_size, models.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(models.scratch / f"{i}.png")

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(FIRST_WORD, models.vocabulary)}" for _ in range(number))

    lines = [
        {"prompt": f"<image:{models.scratch / f'{i % 8}.png'}>{words(asked)}", "completion": f" {words(answered)}"}
        for i, (asked, answered) in enumerate(lengths)
    ]
    path = models.scratch / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return load_dataset(path, ours.model, plan(ours.model.config.composition).processor)


def _our_steps(
    models: Models,
    ours: Contender,
    data: RecordDataset,
    parts: Sequence[str],
    *,
    per_token: bool = False,
    **settings: Any,
) -> Run:
    """Seconds of a step of `vlm train`, or of a token that it learns."""
    model, clock = ours.model, _Clock()
    chosen = TrainingSettings(device="cpu", max_steps=STEPS, trainable=tuple(parts), **settings)
    folder = models.scratch / "ours.checkpoints"

    def once() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        model.set_trainable(parts)
        trainer = _CountingTrainer(
            model,
            chosen,
            data,
            None,
            Checkpoints(folder),
            run={},
            history=RunHistory({}),
            report=lambda report: None,
            step_done=lambda step, total, left: None,
            notify=lambda message: None,
            watching=Watching(),
            use_cpu=True,
        )
        trainer.add_callback(clock)
        trainer.run_from(None)
        return clock.total() / sum(trainer.learned[1:]) if per_token else clock.per_step()

    return once


class _CountingTrainer(VLMTrainer):
    """Counts the tokens that each step learns."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, number = super().get_batch_samples(*args, **kwargs)
        self.learned = [*getattr(self, "learned", []), int(number)]
        return batches, number


class _Clock(TrainerCallback):
    """Notes when each step of a run ended."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    def total(self) -> float:
        """Seconds of all steps but the first."""
        return self.ends[-1] - self.ends[0]

    def per_step(self) -> float:
        return self.total() / (len(self.ends) - 1)


QUESTION = Question(
    name="training",
    asks="How long is a step of `vlm train`, next to Transformers' Trainer, and what does packing gain?",
    measure=measure,
    devices=("cpu",),
    sizes=("tiny", "small"),
)

if __name__ == "__main__":
    run(QUESTION)
