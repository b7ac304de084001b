"""The files that a training run reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_cli.data.mixture import Mixture
from vlm_cli.data.records import PLAIN_READING, Reading

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The files that a run reads and writes.

    Attributes:
        model: the directory that `vlm build` wrote, or a hub id.
        data: records to learn: a source, or a mixture of several.
        output: the directory to write.
        eval_data: records for the held-out loss.
        eval_answers: how many of them are put to the model at each checkpoint, by the examiner of the run.
        resume: continue from the last complete checkpoint, if there is a checkpoint.
        overwrite: replace the output, and delete the checkpoints of an unfinished run.
        keep_checkpoints: keep the checkpoints after the output is written.
        trust_remote_code: run the language model's own code from the model's directory.
        reading: what the user says of the rows and pictures of both.
        backbones: if the run, or its first stage, begins with a delta directory: part -> where its pretrained weights
            are, if the user says so.
        allow_hosts: hosts that backbones may come from.
        cache_features: the folder that keeps what the frozen vision encoder gives for each picture; None keeps nothing.
        verify: compare the hashes of the model's weight files with its manifest.
        merge_adapters: add the adapters of the model to its weights before training, and do not go on training them.
        earlier: the folder with the models of the earlier stages, if the run is the last of several.
        base: the model that the first of several stages began with; an output with adapters names it.
        shim: write the file through which Transformers opens the output with `trust_remote_code`.
    """

    model: str
    data: Path | Mixture
    output: Path
    eval_data: Path | None = None
    eval_answers: int | None = None
    resume: bool = False
    overwrite: bool = False
    keep_checkpoints: bool = False
    trust_remote_code: bool = False
    reading: Reading = PLAIN_READING
    backbones: Mapping[str, str] | None = None
    allow_hosts: tuple[str, ...] = ()
    verify: bool = False
    merge_adapters: bool = False
    cache_features: Path | None = None
    earlier: Path | None = None
    base: str | None = None
    shim: bool = True

    @property
    def beginning(self) -> str:
        """The model that the run, or the first of its stages, begins with."""
        return self.base or self.model

    @property
    def mixture(self) -> Mixture:
        """The records to learn, as a mixture of perhaps one source."""
        return self.data if isinstance(self.data, Mixture) else Mixture.of([self.data])

    def to_dict(self) -> dict[str, Any]:
        """Return the files, and what the user said of them."""
        data = self.data.to_dict() if isinstance(self.data, Mixture) else self.data
        return {**{key: x for key, x in vars(self).items() if key != "reading"}, "data": data, **self.reading.to_dict()}
