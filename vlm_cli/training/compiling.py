"""Compile the layers of the language model for training: each by itself, since they are alike and compile once."""

from __future__ import annotations

from vlm_cli.errors import UsageError
from vlm_cli.modeling.acceleration import check_compiler
from vlm_cli.modeling.language_model import decoder_layers
from vlm_cli.modeling.vlm import VLM
from vlm_cli.training.processes import asks_for_sharding
from vlm_cli.training.settings import TrainingSettings

__all__ = ["compile_layers"]


def compile_layers(model: VLM, settings: TrainingSettings) -> None:
    """Compile the decoder layers in place, for batches of any size. Names of tensors stay as they are.

    Raises:
        UsageError: if something runs inside the layers that the compiler would have to leave them for.
        VLMError: if there is no compiler.
    """
    layers = decoder_layers(model.lang_model, model.config.composition.language_model.decoder_layers)
    reasons = {
        "the fusion puts blocks between them": any(
            layer._forward_pre_hooks or layer._forward_hooks for layer in layers
        ),
        "FSDP gathers weights between them": asks_for_sharding(),
        "--gradient-checkpointing runs them a second time": settings.gradient_checkpointing,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"--compile compiles the layers of the language model, and {reason}. Leave out --compile.")
    check_compiler()
    for layer in layers:
        layer.compile(dynamic=True)
