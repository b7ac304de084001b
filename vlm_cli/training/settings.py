"""The settings of a training run: which files it reads and writes, and how the model learns.

`TrainingSettings` is the only source of the options of `vlm train`: their names, help, choices and defaults.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vlm_cli.composition import PARTS
from vlm_cli.composition.adapters import AdapterSettings, parse_adapters
from vlm_cli.composition.composition import MAX_WEIGHT_DECAY
from vlm_cli.data.mixture import Mixture
from vlm_cli.data.records import PLAIN_READING, Reading
from vlm_cli.errors import UsageError
from vlm_cli.flags import Alias, Flag, find_problems
from vlm_cli.registry import suggest

__all__ = ["DATA", "DEFAULT_RATE", "LEARNING", "LENGTH", "RUN", "Job", "Schedule", "TooLong", "TrainingSettings"]

DATA, LEARNING, LENGTH, RUN = "Data", "Learning", "Length of the run", "Run"  # headings in --help

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

#: What becomes of a record that the language model's context does not hold.
TooLong = Literal["error", "drop", "cut"]

_MAX_SEED = 2**32 - 1  # the largest seed that NumPy takes
_MAX_ROWS = 65_536  # records of a batch
_MAX_STEPS = 1_000_000_000  # also the most epochs and minutes


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
        backbones: of a delta directory, part -> where its pretrained weights are, if the user says so.
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
    def mixture(self) -> Mixture:
        """The records to learn, as a mixture of perhaps one source."""
        return self.data if isinstance(self.data, Mixture) else Mixture.of([self.data])

    def to_dict(self) -> dict[str, Any]:
        """Return the files, and what the user said of them."""
        data = self.data.to_dict() if isinstance(self.data, Mixture) else self.data
        return {**{key: x for key, x in vars(self).items() if key != "reading"}, "data": data, **self.reading.to_dict()}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model learns. The first limit that is reached, of epochs, steps and minutes, ends the run.

    Raises:
        UsageError: listing every value that is not possible.
    """

    batch_size: Annotated[
        int,
        Flag(
            help="Put N records in each batch of each process.",
            heading=DATA,
            metavar="N",
            short="-b",
            aliases=(Alias("--per-device-train-batch-size"),),
            above=0,
            most=_MAX_ROWS,
        ),
    ] = 8
    gradient_accumulation: Annotated[
        int,
        Flag(
            help="Add up the gradients of N batches before each step of the optimizer.",
            heading=DATA,
            metavar="N",
            aliases=(Alias("--gradient-accumulation-steps"),),
            above=0,
            most=_MAX_STEPS,
        ),
    ] = 1
    global_batch_size: Annotated[
        int | None,
        Flag(
            help="Take steps of N records over all processes: vlm adds up the gradients of as many batches as that "
            "needs.",
            heading=DATA,
            metavar="N",
            above=0,
            most=_MAX_STEPS,
        ),
    ] = None
    group_by_length: Annotated[
        bool,
        Flag(
            help="Put records with similar numbers of images and tokens in the same batch, which saves padding.",
            heading=DATA,
        ),
    ] = True
    pack: Annotated[
        int | None,
        Flag(
            help="Join short records to rows of up to N positions of the language model, pictures included; no record "
            "sees another. --batch-size then counts such rows. This is faster where lengths differ.",
            heading=DATA,
            metavar="N",
            above=0,
            most=_MAX_STEPS,
        ),
    ] = None
    streaming: Annotated[
        bool,
        Flag(
            help="Learn the records while they are read, and keep no more of them in memory than the shuffle buffer "
            "holds. Needs --max-steps or --max-minutes.",
            heading=DATA,
        ),
    ] = False
    shuffle_buffer: Annotated[
        int | None,
        Flag(
            help="With --streaming, draw each record from N that are in memory (1000 by default). With 1, only files "
            "are shuffled.",
            heading=DATA,
            metavar="N",
            above=0,
            most=_MAX_STEPS,
        ),
    ] = None
    check: Annotated[
        bool,
        Flag(
            help="With --streaming, read all records before the first step, and list those that cannot be used. "
            "Without --streaming, vlm always does.",
            heading=DATA,
        ),
    ] = False
    bad_rows: Annotated[
        Literal["error", "skip"],
        Flag(
            help="What a record does that cannot be used: end the run, or be left out and named. Without --streaming, "
            "a picture whose damage shows only when it is decoded ends the run.",
            heading=DATA,
        ),
    ] = "error"
    workers: Annotated[
        int | None,
        Flag(
            help="Decode images in N worker processes. By default, up to 4 on a GPU, and none on the CPU.",
            heading=DATA,
            metavar="N",
            aliases=(Alias("--dataloader-num-workers"),),
            least=0,
            most=256,
        ),
    ] = None
    too_long: Annotated[
        TooLong,
        Flag(
            help="What becomes of a record that the language model's context does not hold: it is an error, or vlm "
            "leaves it out, or cuts its end off. vlm tells how many.",
            heading=DATA,
        ),
    ] = "error"
    chat_template: Annotated[
        str,
        Flag(
            help="Which records become turns in the tokenizer's chat template: rows of messages (auto), all, or none. "
            "A FILE holds another template, for all records; OUT keeps it.",
            heading=DATA,
            metavar="auto|all|none|FILE",
        ),
    ] = "auto"
    special_tokens: Annotated[
        bool,
        Flag(
            help="Read the spelling of a special token in a record, such as <|endofchunk|>, as that token; without "
            "this option it is plain text.",
            heading=DATA,
        ),
    ] = False
    trainable: Annotated[
        tuple[str, ...] | None,
        Flag(
            help=f"Train these parts, and not those that the model's composition names. Parts: {', '.join(PARTS)}; "
            "none, where only adapters train.",
            heading=LEARNING,
            metavar="PART,…",
        ),
    ] = None
    lora: Annotated[
        tuple[str, ...] | None,
        Flag(
            help="Train small matrices beside the linear layers of PART, and leave PART as it is: LoRA. Settings are "
            "r=16, alpha=32 (twice r), targets=q_proj+v_proj (names of layers; all by default), dropout=0, and dora or "
            "rslora. May be given several times. OUT then holds the adapters and the parts that train whole, and names "
            "MODEL for the rest. For a directory that runs alone: vlm export OUT OTHER --format merged.",
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
            most=_MAX_STEPS,
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
    epochs: Annotated[
        float | None,
        Flag(
            help="Stop after X passes over the records. If no limit is given, of passes, steps or minutes, X is 1.",
            heading=LENGTH,
            metavar="X",
            aliases=(Alias("--num-train-epochs"),),
            above=0,
            most=_MAX_STEPS,
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        Flag(help="Stop after N steps of the optimizer.", heading=LENGTH, metavar="N", above=0, most=_MAX_STEPS),
    ] = None
    max_minutes: Annotated[
        float | None,
        Flag(
            help="Stop after X minutes, held-out losses included. The schedule of the learning rate ends at that time.",
            heading=LENGTH,
            metavar="X",
            above=0,
            most=_MAX_STEPS,
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu"],
        Flag(
            help="Train on a GPU if the machine has one (auto), or on the CPU.",
            heading=RUN,
            hint="To choose one of several GPUs, set CUDA_VISIBLE_DEVICES. To use several, start vlm with `torchrun` "
            "or `accelerate launch`.",
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag(help="Write OUT's weights with this dtype; auto is the dtype of MODEL.", heading=RUN),
    ] = "auto"
    save_every: Annotated[
        int,
        Flag(
            help="Write a checkpoint after every N steps.",
            heading=RUN,
            metavar="N",
            aliases=(Alias("--save-steps"),),
            above=0,
            most=_MAX_STEPS,
        ),
    ] = 500
    report_to: Annotated[
        tuple[str, ...] | None,
        Flag(
            help="Send what is measured to these programs, too: tensorboard, wandb, trackio. Of tensorboard, OUT/runs "
            "holds the files.",
            heading=RUN,
            metavar="NAME,…",
            items=("tensorboard", "wandb", "trackio"),
        ),
    ] = None
    best: Annotated[
        Literal["loss", "score"] | None,
        Flag(
            help="Keep the checkpoint with the lowest held-out loss, or with the most right answers (score, with "
            "--eval-answers), and write it as OUT. Without this option, OUT has the last weights.",
            heading=RUN,
        ),
    ] = None
    log_every: Annotated[
        int,
        Flag(
            help="Report the loss after every N steps.",
            heading=RUN,
            metavar="N",
            aliases=(Alias("--logging-steps"),),
            above=0,
            most=_MAX_STEPS,
        ),
    ] = 10

    def __post_init__(self) -> None:
        if self.trainable == ("none",):
            object.__setattr__(self, "trainable", ())
        problems = find_problems(self)
        for part in self.trainable or ():
            if part not in PARTS:
                problems.append(
                    f"unknown part {part!r} in --trainable.{suggest(part, PARTS)} Known: {', '.join(PARTS)}."
                )
        if self.global_batch_size is not None and self.gradient_accumulation != 1:
            problems.append("--global-batch-size and --gradient-accumulation contradict each other. Give one of them.")
        try:
            _ = self.adapters
        except UsageError as error:
            problems.append(str(error))
        if self.stochastic_rounding and not (self.bf16 and self.optimizer == "adamw"):
            problems.append("--stochastic-rounding rounds to bfloat16 in AdamW. Add --bf16, and leave out --optimizer.")
        problems += self._streaming_problems()
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def adapters(self) -> dict[str, AdapterSettings]:
        """Part -> the adapter that trains beside it.

        Raises:
            UsageError: for a text that describes none.
        """
        return parse_adapters(self.lora or (), self.trainable or ())

    def _streaming_problems(self) -> list[str]:
        if not self.streaming:
            return [] if self.shuffle_buffer is None else ["--shuffle-buffer has a meaning only with --streaming."]
        if self.too_long == "cut":
            return ["--streaming does not count what it cuts. Give --too-long drop, which names the records, or error."]
        if self.epochs is not None and self.pack is not None:
            return ["with --streaming and --pack, nobody knows how long a pass is. Give --max-steps, not --epochs."]
        if self.epochs is not None and not self.check:
            return [
                "with --streaming, nobody counts the records of a pass. Give --max-steps or --max-minutes, not "
                "--epochs; or add --check, which reads all records before the first step."
            ]
        if self.epochs is None and self.max_steps is None and self.max_minutes is None:
            return ["--streaming never comes to an end by itself. Give --max-steps or --max-minutes."]
        return []

    def total_steps(self, num_records: int | None, num_processes: int) -> int | None:
        """Return the number of steps of the run; None if only `max_minutes` limits it.

        Args:
            num_records: of a pass; None if nobody has counted them.
            num_processes: that share the run.
        """
        epochs = self.epochs
        if epochs is None and self.max_steps is None and self.max_minutes is None:
            epochs = 1.0
        limits = [] if self.max_steps is None else [self.max_steps]
        if epochs is not None:
            assert num_records is not None  # see `_streaming_problems`
            limits.append(max(1, math.ceil(epochs * num_records / self.step_size(num_processes))))
        return min(limits, default=None)

    def step_size(self, num_processes: int) -> int:
        """Return the number of records in one step, over all processes."""
        return self.batch_size * self.accumulation(num_processes) * num_processes

    def accumulation(self, num_processes: int) -> int:
        """Return the number of batches of each process in one step.

        Raises:
            UsageError: if no number of batches makes up `global_batch_size`.
        """
        wanted, at_once = self.global_batch_size, self.batch_size * num_processes
        if wanted is None:
            return self.gradient_accumulation
        if wanted % at_once:
            raise UsageError(
                f"--global-batch-size {wanted} is no multiple of --batch-size × processes, {self.batch_size} × "
                f"{num_processes}. Change one of them."
            )
        return wanted // at_once

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
