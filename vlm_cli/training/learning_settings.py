"""Which parts of a model learn, and by which rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from vlm_cli.composition import PARTS
from vlm_cli.composition.adapters import AdapterSettings, parse_adapters
from vlm_cli.composition.composition import MAX_WEIGHT_DECAY
from vlm_cli.flags import Alias, Flag
from vlm_cli.training.data_settings import MOST_STEPS
from vlm_cli.training.step_settings import LEARNING, StepSettings

__all__ = ["DEFAULT_RATE", "LEARNING", "LearningSettings", "Schedule"]

#: Learning rate of a part to which the user gives none.
DEFAULT_RATE = 1e-4

#: Transformers' schedules that follow from the step alone, by its names.
Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]

_MAX_SEED = 2**32 - 1  # the largest seed that NumPy takes


@dataclass(frozen=True, kw_only=True)
class LearningSettings(StepSettings):
    """Parts, rates, schedule and decay, beside what decides the cost of a step."""

    trainable: Annotated[
        tuple[str, ...] | None,
        Flag(
            help=f"Train these parts, and not those that the model's composition names. Parts: {', '.join(PARTS)}; "
            "none, where only adapters train.",
            heading=LEARNING,
            metavar="PART,…",
        ),
    ] = None
    learning_rate: Annotated[
        float | Mapping[str, float],
        Flag(
            help="Highest learning rate of the run: RATE for all parts, or PART=RATE,… for some. Parts without a rate "
            "have RATE, or 1e-4.",
            heading=LEARNING,
            metavar="RATE,PART=RATE,…",
            short="--lr",
            per=PARTS,
            above=0,
            most=1_000,
        ),
    ] = DEFAULT_RATE
    layer_decay: Annotated[
        float | None,
        Flag(
            help="Give each layer of the vision encoder X times the learning rate of the layer above it.",
            heading=LEARNING,
            metavar="X",
            above=0,
            most=1,
        ),
    ] = None
    schedule: Annotated[
        Schedule,
        Flag(
            help="How the learning rate falls after the warm-up, by Transformers' names: cosine, linear, constant (it "
            "falls not at all), constant_with_warmup, cosine_with_restarts, polynomial, inverse_sqrt, "
            "cosine_with_min_lr, cosine_warmup_with_min_lr or warmup_stable_decay.",
            heading=LEARNING,
            metavar="NAME",
            aliases=(Alias("--lr-scheduler-type"),),
            hint="A schedule that follows the loss, such as reduce_lr_on_plateau, is not possible.",
        ),
    ] = "cosine"
    schedule_options: Annotated[
        Mapping[str, float] | None,
        Flag(
            help="Settings of the schedule in Transformers' words, such as min_lr_rate=0.1 or num_cycles=3.",
            heading=LEARNING,
            metavar="NAME=X,…",
            aliases=(Alias("--lr-scheduler-kwargs"),),
        ),
    ] = None
    warmup_steps: Annotated[
        float,
        Flag(
            help="Raise the learning rate from 0 over the first N steps. Below 1, N is a share of the run.",
            heading=LEARNING,
            metavar="N",
            old_names=("--warmup",),
            aliases=(Alias("--warmup-ratio", below=1),),
            least=0,
            most=MOST_STEPS,
        ),
    ] = 0.03
    weight_decay: Annotated[
        float | Mapping[str, float] | None,
        Flag(
            help="Use the weight decay X, and not that of the model's composition. PART=X sets that of one part.",
            heading=LEARNING,
            metavar="X,PART=X,…",
            per=PARTS,
            least=0,
            most=MAX_WEIGHT_DECAY,
        ),
    ] = None
    max_grad_norm: Annotated[
        float,
        Flag(
            help="Scale a gradient whose norm is above X down to X. 0 scales none.",
            heading=LEARNING,
            metavar="X",
            old_names=("--clip",),
            least=0,
            most=1e9,
        ),
    ] = 1.0
    compile: Annotated[
        bool,
        Flag(
            help="Compile the layers of the language model, which takes up to a minute before the first step. Steps "
            "are then faster. Not with cross-attention, whose blocks stand between the layers.",
            heading=LEARNING,
        ),
    ] = False
    seed: Annotated[
        int,
        Flag(
            help="Seed for the order of the records and for dropout.",
            heading=LEARNING,
            metavar="N",
            least=0,
            most=_MAX_SEED,
        ),
    ] = 0

    @property
    def adapters(self) -> dict[str, AdapterSettings]:
        """Part -> the adapter that trains beside it.

        Raises:
            UsageError: for a text that describes none.
        """
        return parse_adapters(self.lora or (), self.trainable or ())
