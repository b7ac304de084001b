"""How a training run reads its records and makes batches of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vlm_cli.flags import Alias, Flag

__all__ = ["DATA", "MOST_STEPS", "DataSettings", "TooLong"]

DATA = "Data"  # heading in --help

#: What becomes of a record that the language model's context does not hold.
TooLong = Literal["error", "drop", "cut"]

_MAX_ROWS = 65_536  # records of a batch
MOST_STEPS = 1_000_000_000  # also the most epochs and minutes


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Batches, and the records in them."""

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
            most=MOST_STEPS,
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
            most=MOST_STEPS,
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
            most=MOST_STEPS,
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
            most=MOST_STEPS,
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
