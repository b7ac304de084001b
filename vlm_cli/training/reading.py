"""Read the records of a run, and what the frozen vision encoder gives for their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.training.dataset import RecordDataset, load_dataset
from vlm_cli.training.features import FeatureCache
from vlm_cli.training.job import Job
from vlm_cli.training.listener import Listener
from vlm_cli.training.processes import Processes
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.stream_opening import open_stream
from vlm_cli.training.streaming import StreamedRecords
from vlm_cli.writing.choice import TemplateChoice
from vlm_cli.writing.writer import PromptWriter

__all__ = ["cache_features", "make_writer", "read_data"]


def read_data(
    job: Job, settings: TrainingSettings, model: VLM, processor: VLMProcessor, processes: Processes, listener: Listener
) -> tuple[RecordDataset | StreamedRecords, RecordDataset | None]:
    """Read and check the records to learn, and those for the held-out loss.

    Args:
        job: names the records.
        settings: how they are read.
        model: that learns them.
        processor: of the model.
        processes: among which a stream is dealt.
        listener: hears what the user should know of them.

    Raises:
        VLMError: listing the records that cannot be learned.
    """
    files = [None if settings.streaming else job.mixture, job.eval_data]
    writer = make_writer(settings, processor)
    loaded = model, processor, job.reading, writer, settings.too_long
    skips = (settings.bad_rows == "skip", False)  # a held-out loss without some of its records is another one
    sets = [None if x is None else load_dataset(x, *loaded, skips=skip) for x, skip in zip(files, skips, strict=True)]
    for data in sets:
        for note in [] if data is None else data.notes:
            listener.notify(note)
        if data is not None and data.split:
            listener.notify(
                f"Note: in {count_of(len(data.split), 'record')}, as in {data.split[0]}, one token would hold the "
                "end of the prompt and the start of the completion, so vlm split it. Write a space between the two "
                "at the start of the completion."
            )
    train_set, eval_set = sets
    if settings.streaming:
        stream = open_stream(job, settings, model, processor, writer, processes=processes, listener=listener)
        return stream, eval_set
    assert train_set is not None
    return train_set, eval_set


def cache_features(
    folder: Path,
    model: VLM,
    processor: VLMProcessor,
    sets: Sequence[RecordDataset | None],
    *,
    bf16: bool,
    use_cpu: bool,
    listener: Listener,
) -> None:
    """Let the vision encoder read the pictures of all records that the folder does not hold yet."""
    images, device = processor.image_processor, None if use_cpu else torch.accelerator.current_accelerator()
    listener.step("encoding pictures")
    empty = FeatureCache.of(folder, model, images, bf16=bf16)
    for data in (x for x in sets if x is not None):
        data.features = []
        for source, loader in enumerate(data.loaders):
            cache = replace(empty, digests={})  # each source has its own folder, where relative paths start
            media = data.media_of(source)
            cache.fill(media, loader, images, model, device=device or torch.device("cpu"), tell=listener.notify)
            data.features.append(cache)


def make_writer(settings: TrainingSettings, processor: VLMProcessor) -> PromptWriter:
    """Make what turns the prompts of a run into tokens."""
    return PromptWriter(
        processor,
        TemplateChoice.parse(settings.chat_template),
        parse_special_tokens=settings.special_tokens,
    )
