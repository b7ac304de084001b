"""Whether others can fetch what a delta directory leaves out: one that is written, or one that a run will write."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.assembling import read_backbones
from vlm_cli.checkpoint.backbones import BackbonePlaces, pin_model
from vlm_cli.checkpoint.completing import merging_command
from vlm_cli.checkpoint.delta import PREFIXES
from vlm_cli.checkpoint.directory import read_config
from vlm_cli.errors import UsageError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.training.job import Job
from vlm_cli.training.settings import TrainingSettings

__all__ = ["check_places", "check_run", "completing_command"]

_LOCAL = ("path", "model")  # kinds of backbones that are files of this machine, unless they have a commit


def check_places(folder: Path, config: VLMConfig) -> None:
    """Check that others can fetch what a delta directory leaves out.

    Raises:
        UsageError: naming the parts that are files of this machine.
    """
    if local := _find_local(config.backbones if config.is_delta else {}):
        raise UsageError(
            f"{str(folder)!r} is a delta directory, and nobody else can fetch its {local}. Make it whole, and send "
            f"that: {completing_command(folder, config)}"
        )


def check_run(job: Job, settings: Sequence[TrainingSettings], repository: str) -> None:
    """Check before a run that others will be able to fetch what its output leaves out, if it trains adapters.

    Args:
        job: of the run.
        settings: of each of its stages.
        repository: to which the output will be sent.

    Raises:
        UsageError: naming the parts that are files of this machine.
    """
    config = read_config(job.model, trust_remote_code=job.trust_remote_code)
    had = set(config.adapters or ())
    adapters, trained = (set(), had) if job.merge_adapters else (had, set())
    whole = set(config.composition.trainable)
    for stage in settings:
        adapters = adapters | set(stage.adapters)
        whole = set(whole if stage.trainable is None else stage.trainable) - adapters
        trained = trained | whole
    if not adapters or len({stage.dtype for stage in settings}) > 1:  # a stage that rounds weights changes all of them
        return
    if config.is_delta:
        places = read_backbones(job.model, config, BackbonePlaces(job.backbones or {}))
    else:
        places = dict.fromkeys(PREFIXES, pin_model(job.model))
    if local := _find_local({part: asdict(place) for part, place in places.items() if part not in trained}):
        raise UsageError(
            f"--push-to-hub cannot send what this run would write: a delta directory, since it trains adapters, and "
            f"nobody else can fetch its {local}. Send the model first, and train that:\n"
            f"  vlm push {shlex.quote(job.model)} ORG/NAME\n"
            "or train without --push-to-hub, make the output whole, and send that:\n"
            f"  {merging_command(str(job.output))}\n"
            f"  vlm push OUT {repository}"
        )


def _find_local(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the parts that are files of this machine, and where they are; empty for none."""
    local = {name: x["location"] for name, x in records.items() if x.get("kind") in _LOCAL and not x.get("revision")}
    parts = " and ".join(name.replace("_", " ") for name in local)
    return f"{parts} from this machine ({', '.join(dict.fromkeys(local.values()))})" if local else ""


def completing_command(folder: Path, config: VLMConfig) -> str:
    """Return the command that makes a delta directory whole."""
    place = str(folder)
    return merging_command(place) if config.adapters else f"vlm build OUT --from {shlex.quote(place)}"
