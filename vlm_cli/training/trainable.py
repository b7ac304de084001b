"""Load the model of a run: which of its parts train, and which adapters stand beside them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from vlm_cli.checkpoint.assembling import read_backbones
from vlm_cli.checkpoint.backbones import BackbonePlaces
from vlm_cli.checkpoint.create import cast
from vlm_cli.checkpoint.directory import load, read_config
from vlm_cli.composition import PARTS, Composition
from vlm_cli.errors import CheckpointError, UsageError
from vlm_cli.flags import OTHERS
from vlm_cli.modeling.adapters import adapter_parameters, add_adapter
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.training.job import Job
from vlm_cli.training.learning_settings import LearningSettings
from vlm_cli.training.rates import check_parts
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.step_settings import StepSettings

__all__ = ["choose_precision", "load_trainable", "make_trainable", "trains_on_cpu"]


def trains_on_cpu(settings: TrainingSettings) -> bool:
    """Tell whether a run trains on the CPU."""
    return settings.device == "cpu" or not torch.accelerator.is_available()


def load_trainable(job: Job, settings: TrainingSettings) -> tuple[VLM, VLMProcessor, torch.dtype]:
    """Load a model, choose its trainable parts, and convert them to float32.

    Adapters that the model has go on training, unless the job merges them first.

    Returns:
        The model, its processor, and the dtype of the weights on the disk.

    Raises:
        VLMError: if the model cannot be loaded, or no parameter would train.
    """
    model, processor = load(
        job.model,
        trust_remote_code=job.trust_remote_code,
        backbones=job.backbones if job.base is None else None,  # an earlier stage found them
        allow_hosts=job.allow_hosts,
        verify=job.verify,
    )
    stored = model.dtype
    choose_precision(model, settings)
    if job.merge_adapters and job.base is None:  # later stages begin with what an earlier one merged
        _merge(job, model)
    make_trainable(model, settings, job.model)
    if model.config.adapters:
        _check_output(job)
    return model, processor, stored


def choose_precision(model: VLM, settings: StepSettings) -> None:
    """Convert a model to float32, unless it computes in bfloat16 and has weights of half precision."""
    if not (settings.bf16 and model.dtype in (torch.bfloat16, torch.float16)):
        model.float()


def make_trainable(model: VLM, settings: LearningSettings, name: str) -> None:
    """Set which parts of a model train, in which dtype, and put new adapters beside others.

    Args:
        model: after `choose_precision`; on the meta device, it has the shapes of a run.
        settings: of the run.
        name: of the model, for messages.

    Raises:
        UsageError: if nothing would train, a part would train in two ways, or a part can have no adapter.
    """
    _choose_parts(name, settings, model)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):  # on the CPU, it takes no half weights for float32 inputs
            module.float()
    parts = model.config.composition.trainable
    model.set_trainable(parts)
    for part in parts:
        _set_precision(model.part_modules()[part], rounds_at_random=settings.stochastic_rounding)
    _add_adapters(model, settings)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            f"nothing trains: {', '.join(parts)} {'has' if len(parts) == 1 else 'have'} no parameters in this "
            "composition. Add another part: --trainable PART,PART."
        )


def _merge(job: Job, model: VLM) -> None:
    """Add the adapters of a model to the weights that they stand beside, in float32.

    Raises:
        UsageError: if it has none.
        CheckpointError: if a merged weight is not finite.
    """
    if not model.config.adapters:
        raise UsageError(f"{job.model!r} has no adapter, so there is nothing to merge. Leave out --merge-adapters.")
    dtype, parts = model.dtype, ", ".join(model.config.adapters)
    cast(model, torch.float32)
    try:
        model.merge_adapters()
    except ValueError as error:
        raise CheckpointError(f"the adapter of {parts} cannot be merged: {error}") from None
    cast(model, dtype)


def _set_precision(module: torch.nn.Module, *, rounds_at_random: bool) -> None:
    """Choose the dtype of a part that trains: in half precision, it would lose small updates that are not rounded so.

    Norms stay in float32, where they are few and compute.
    """
    module.float()
    if rounds_at_random:
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.bfloat16()


def _choose_parts(name: str, settings: LearningSettings, model: VLM) -> None:
    """Write into the composition of a model which parts train whole, and with which weight decay.

    Raises:
        UsageError: if nothing would train, a part would train in two ways, or a number is given to a frozen part.
    """
    composition, had = model.config.composition.to_dict(), tuple(model.config.adapters or ())
    for part in had:
        if part in settings.adapters or part in (settings.trainable or ()):
            option = "--lora" if part in settings.adapters else "--trainable"
            raise UsageError(
                f"{name!r} has an adapter of its {part} already, which the run goes on training. Leave {part} out "
                f"of {option}, or add --merge-adapters, which first adds the adapter to the weights: vlm train "
                f"{shlex.quote(name)} … --merge-adapters"
            )
    adapters = (*had, *settings.adapters)
    whole = composition["trainable"] if settings.trainable is None else settings.trainable
    composition["trainable"] = [part for part in whole if part not in adapters]
    decay = settings.weight_decay
    if isinstance(decay, Mapping):
        decay = decay.get(OTHERS)
    if decay is not None:
        composition["weight_decay"] = decay
    model.config.composition = Composition.from_dict(composition)
    parts = model.config.composition.trainable
    if not parts and not adapters:
        who = "the composition" if settings.trainable is None else "--trainable"
        raise UsageError(f"nothing trains: {who} names no part. Add --trainable PART,PART. Known: {', '.join(PARTS)}.")
    numbers = {"--learning-rate": settings.learning_rate, "--weight-decay": settings.weight_decay}
    check_parts(numbers, settings.layer_decay, (*parts, *adapters))


def _check_output(job: Job) -> None:
    """Refuse to replace the directory whose weights an output with adapters names.

    Raises:
        UsageError: naming it.
    """
    base = job.beginning
    config = read_config(base, trust_remote_code=job.trust_remote_code)
    places = [base]
    if config.is_delta:
        places = [x.location for x in read_backbones(base, config, BackbonePlaces(job.backbones or {})).values()]
    if job.output.exists() and any(Path(place).exists() and job.output.samefile(place) for place in places):
        raise UsageError(
            f"--output {str(job.output)!r} cannot replace the model whose weights it would name: an output with "
            "adapters holds only what differs from them. Give another directory to --output."
        )


def _add_adapters(model: VLM, settings: LearningSettings) -> None:
    """Put the adapters of a run beside the parts of its model. The same seed gives the same ones.

    Raises:
        UsageError: if a part can have none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for part, adapter in settings.adapters.items():
            add_adapter(model.part_modules()[part], part, adapter)
    if settings.adapters:
        model.config.adapters = [*(model.config.adapters or ()), *settings.adapters]
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
    model.train(model.training)
