"""A step of training without a weight: the model of shapes that a run would train, and its optimizer's states."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM
from vlm_cli.training.learning_settings import DEFAULT_RATE
from vlm_cli.training.optimizer import make_optimizer
from vlm_cli.training.rates import group_parameters
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.trainable import choose_precision, make_trainable

__all__ = ["count_states", "plan_step"]

#: What AdamW of 8 bits keeps of a tensor: a byte for each number and a scale for so many of them, twice. Smaller
#: tensors keep their dtype. Source: torchao's `AdamW8bit`.
_LEAST_QUANTIZED, _BLOCK, _SCALE_BYTES, _TABLE_BYTES = 4096, 256, 4, 4 * 256


def plan_step(model: VLM, settings: TrainingSettings, name: str) -> int:
    """Let a model of shapes train as a run would let the model of weights train; it is changed in place.

    Args:
        model: on the meta device, in the dtype of its weights.
        settings: of the run.
        name: of the model, for messages.

    Returns:
        The bytes of the optimizer's states.

    Raises:
        UsageError: if nothing would train, or a part can have no adapter.
    """
    with meta_device():
        choose_precision(model, settings)
        make_trainable(model, settings, name)
    if settings.gradient_checkpointing:
        # Since Transformers 5.23 the method is called "activation", and "gradient" is deprecated.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return count_states(model, settings)


@torch.no_grad()
def count_states(model: VLM, settings: TrainingSettings) -> int:
    """Count the bytes that the optimizer of a run keeps from step to step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if settings.stochastic_rounding:
        return sum(2 * _bytes_of_8_bits(p) for p in trained)
    groups = group_parameters(model, settings.learning_rate, default_rate=DEFAULT_RATE)
    optimizer = make_optimizer(model, settings.optimizer, groups)
    for p in trained:
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def _bytes_of_8_bits(parameter: Tensor) -> int:
    numbers = parameter.numel()
    if numbers < _LEAST_QUANTIZED or numbers % _BLOCK:
        return parameter.nbytes
    return numbers + numbers // _BLOCK * _SCALE_BYTES + _TABLE_BYTES
