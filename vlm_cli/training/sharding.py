"""What FSDP must know of a VLM whose weights it spreads over processes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback

from vlm_cli.modeling.fusion.cross_attention import GatedCrossAttentionBlock

__all__ = ["GatherForMethods"]


class GatherForMethods(TrainerCallback):
    """Let FSDP2 gather a module's weights for its methods, too, and not for `forward` alone.

    A gated block computes keys and values of the media before the language model runs.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        for module in () if model is None else model.modules():
            if isinstance(module, GatedCrossAttentionBlock):
                register_fsdp_forward_method(module, "project")
