"""`TrainableParts`: the parts of a VLM by name, which of them train, and how their activations are checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_cli.composition import PARTS
from vlm_cli.modeling.adapters import adapter_parameters, is_frozen, merge_adapters, set_adapter_training
from vlm_cli.modeling.conditioning import Conditioning
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vision_encoder import VisionEncoder

__all__ = ["TrainableParts"]


class TrainableParts(PreTrainedModel):
    """A model of parts, each of which trains as a whole, is frozen, or is frozen with an adapter that trains."""

    #: What the names of a part's tensors begin with, by the part's name in `PARTS`.
    PART_PREFIXES: ClassVar[dict[str, str]] = {
        part: "lang_model." if part == "language_model" else f"{part}." for part in PARTS
    }

    config: VLMConfig
    vision_encoder: VisionEncoder
    conditioning: Conditioning | None
    _condition: Callable[[Conditioning | None], AbstractContextManager[None]]

    def part_modules(self) -> dict[str, nn.Module]:
        """Return the module of each part, by the part's name in `PARTS`."""
        return {part: self.get_submodule(prefix.removesuffix(".")) for part, prefix in self.PART_PREFIXES.items()}

    def trained_prefixes(self) -> list[str]:
        """Return what the tensor names of each part that trains begin with. Adapters do not count."""
        modules = self.part_modules().items()
        return [self.PART_PREFIXES[part] for part, x in modules if not is_frozen(x)]

    def trained_names(self) -> list[str]:
        """Say what trains: the parts that train whole, and the adapters."""
        return [*self.config.composition.trainable, *(f"an adapter of {part}" for part in self.config.adapters or ())]

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Train these parts and freeze the others. Adapters train in either case.

        Args:
            parts: names from `PARTS`.

        Raises:
            ValueError: for another name.
        """
        parts = {parts} if isinstance(parts, str) else set(parts)
        if unknown := parts - set(PARTS):
            raise ValueError(f"unknown parts {sorted(unknown)}. Known: {', '.join(PARTS)}.")
        for name, module in self.part_modules().items():
            module.requires_grad_(name in parts)
            for _, parameter in adapter_parameters(module):
                parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> TrainableParts:
        """Switch to training mode. A part that is frozen stays as in evaluation: it drops nothing out."""
        super().train(mode)
        for part, module in self.part_modules().items():
            # The blocks of the fusion have no dropout, and they checkpoint activations only in training mode.
            if mode and part != "fusion" and is_frozen(module):
                module.eval()
                for layer in module.modules():
                    # So that it checkpoints its activations; `_checkpoint` evaluates it nevertheless.
                    layer.training = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
                set_adapter_training(module, True)
        return self

    def merge_adapters(self) -> None:
        """Add each adapter to the weights that it stands beside, in place. The model is then one without adapters.

        Raises:
            ValueError: if a merged weight is not finite.
        """
        merge_adapters(self)
        self.config.adapters = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the trainable parameters for an optimizer: with and without the composition's weight decay."""
        composition = self.config.composition
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, module in self.part_modules().items():
            group = decayed if name in composition.weight_decay_on else others
            group += [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": decayed, "weight_decay": composition.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _set_gradient_checkpointing(  # type: ignore[override]  # whatever arguments this Transformers has
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, partial(self._checkpoint, gradient_checkpointing_func), **kwargs)
        self.train(self.training)

    def _checkpoint(
        self, recompute: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Checkpoint a function, and run it again in the backward pass with the conditioning of this moment.

        With remote code, and with Transformers before 5.23, a layer's hooks run again together with the layer. The
        block that such a hook runs is then inside a checkpoint already, and is not checkpointed a second time.
        """
        function = _evaluating_frozen(function)
        conditioning = self.conditioning
        if conditioning is not None and conditioning.is_checkpointed:
            return function(*args, **kwargs)
        kept = None if conditioning is None else replace(conditioning, is_checkpointed=True)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._condition(kept):
                return function(*args, **kwargs)

        return recompute(run, *args, **kwargs)


def _evaluating_frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a frozen layer of Transformers run as in evaluation, although it checkpoints only in training mode.

    Args:
        function: what the layer wants to run again: its `forward` or `__call__`, with itself as the first argument or
            bound to it.
    """
    if isinstance(function, partial):
        layer = function.args[0] if function.args else getattr(function.func, "__self__", None)
    else:
        layer = getattr(function, "__self__", None)
    if not isinstance(layer, GradientCheckpointingLayer) or not is_frozen(layer):
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return function(*args, **kwargs)
        finally:
            layer.training = before

    return run
