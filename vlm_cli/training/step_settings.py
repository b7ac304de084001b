"""What decides the cost of one step of training, beside the parts that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vlm_cli.flags import Flag

__all__ = ["LEARNING", "StepSettings"]

LEARNING = "Learning"  # heading in --help


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Adapters, optimizer, precision and checkpointing."""

    lora: Annotated[
        tuple[str, ...] | None,
        Flag(
            help="Train small matrices beside the linear layers of PART, and leave PART as it is: LoRA. Settings are "
            "r=16, alpha=32 (twice r), targets=q_proj+v_proj (names of layers; all by default), dropout=0, and dora or "
            "rslora. May be given several times. A trained directory then holds the adapters and the parts that train "
            "whole, and names its model for the rest. For one that runs alone: vlm export DIR OUT --format merged.",
            heading=LEARNING,
            metavar="PART[:r=R,…]",
            repeated=True,
        ),
    ] = None
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Flag(
            help="Choose the optimizer. muon updates matrices with Muon, and all other parameters with AdamW.",
            heading=LEARNING,
        ),
    ] = "adamw"
    bf16: Annotated[
        bool, Flag(help="Compute in bfloat16; the weights that train stay in float32.", heading=LEARNING)
    ] = False
    stochastic_rounding: Annotated[
        bool,
        Flag(
            help="With --bf16: keep the linear layers that train in bfloat16, too, and round each update up or down "
            "at random, so that small ones count on average. AdamW then keeps states of 8 bits (torchao): 6 bytes for "
            "each weight, gradients included, and not 16.",
            heading=LEARNING,
        ),
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        Flag(help="Compute activations a second time in the backward pass: less memory, more time.", heading=LEARNING),
    ] = False
