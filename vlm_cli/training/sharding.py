"""What several processes that share gradients or weights need of a VLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback

from vlm_cli.errors import UsageError
from vlm_cli.modeling.fusion.cross_attention import GatedCrossAttentionBlock
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.modeling.vlm import VLM
from vlm_cli.training.processes import asks_for_sharding

__all__ = ["GatherForMethods", "blank_media", "check_sharding"]


def check_sharding(is_sharded: bool) -> None:
    """Check that weights are spread over the processes if the launcher asked for it.

    Raises:
        UsageError: if they are not.
    """
    if asks_for_sharding() and not is_sharded:
        raise UsageError(
            "the launcher asks for FSDP, and Accelerate spreads weights over several accelerators only. Start a "
            "process for each GPU, or leave FSDP out."
        )


def blank_media(model: VLM, rows: int, device: torch.device, *, encoded: bool = False) -> dict[str, Tensor]:
    """Return a medium that nobody sees for each row of a batch of text alone.

    Processes wait for each other in each module that has a share of the weights, and for the gradient of each weight.
    With these media, a process without images calls the same modules, and gets the same gradients of zero.

    Args:
        model: a `VLM`.
        rows: number of rows.
        device: of the batch.
        encoded: other batches hold what the vision encoder gave for their images, not the images.
    """
    encoder = model.vision_encoder
    shape: tuple[int, ...] = encoder.num_channels, *encoder.image_size
    if encoded:
        shape = find_tower_shape(
            model.config.vision_config, encoder.layer, class_token=encoder.class_token, norm=encoder.norm
        )
    blank = torch.zeros(rows, 1, 1, *shape, device=device)
    mask = torch.zeros(rows, 1, 1, dtype=torch.bool, device=device)
    return {"vision_features" if encoded else "pixel_values": blank, "vision_mask": mask}


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
