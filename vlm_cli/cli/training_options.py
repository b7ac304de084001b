"""The arguments and options of `vlm train` that say what it reads and writes; `TrainingSettings` has the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models
from vlm_cli.training.data_settings import DATA
from vlm_cli.training.settings import RUN
from vlm_cli.training.step_settings import LEARNING

__all__ = [
    "CacheFeaturesOption",
    "DataOption",
    "EvalAnswersOption",
    "EvalDataOption",
    "KeepCheckpointsOption",
    "MergeAdaptersOption",
    "ModelOption",
    "OutputOption",
    "OverwriteOption",
    "PushOption",
    "ResumeFromOption",
    "ResumeOption",
    "StagesOption",
    "TrustOption",
    "WeightsOption",
]

MAX_RECORDS = 1_000_000_000  # of a file

ModelOption = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Directory that `vlm build` wrote, or hub id.",
        show_default=False,
        autocompletion=complete_models,
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the trained model to the directory OUT.")
]
DataOption = Annotated[
    list[str] | None,
    option(
        DATA,
        "Learn the records of SOURCE: a file of JSON lines or JSON, Parquet, Arrow or tar files ('a/{000..012}.tar', "
        "'a/*.parquet'), a directory of them, hf:ORG/NAME[:CONFIG][:SPLIT], - for stdin, or a YAML file of several "
        "sources. Give it several times for several sources.",
        "--data",
        "-d",
        metavar="SOURCE",
    ),
]
WeightsOption = Annotated[
    str | None,
    option(
        DATA,
        "With several --data, draw the first source so often, the second so often, and so on: 2,1 draws twice as many "
        "records from the first. Without weights, a pass shows each record once.",
        metavar="X,…",
    ),
]
EvalDataOption = Annotated[
    Path | None,
    option(DATA, "Measure the loss on the records of SOURCE at each checkpoint.", metavar="SOURCE"),
]
StagesOption = Annotated[
    Path | None,
    option(
        DATA,
        "Train in the stages that FILE (YAML) describes, each with its own records, parts, rates and length. Other "
        "options hold for every stage.",
        metavar="FILE",
    ),
]
CacheFeaturesOption = Annotated[
    Path | None,
    option(
        DATA,
        "Keep what the frozen vision encoder gives for each picture in the folder DIR, so that it reads a picture once "
        "and not in each pass. vlm first tells how much that takes.",
        metavar="DIR",
    ),
]
EvalAnswersOption = Annotated[
    int | None,
    option(
        DATA,
        "Put the first N records of --eval-data to the model before the first step and at each checkpoint, as "
        "`vlm eval` does. The log and OUT/run.html show the answers.",
        min=1,
        max=MAX_RECORDS,
        metavar="N",
    ),
]
ResumeOption = Annotated[
    bool,
    option(RUN, "Continue an interrupted run from its last complete checkpoint.", "--resume"),
]
OverwriteOption = Annotated[
    bool,
    option(RUN, "Replace OUT if vlm wrote it, and delete the checkpoints of an unfinished run.", "--overwrite"),
]
KeepCheckpointsOption = Annotated[
    bool,
    option(RUN, "Keep OUT.checkpoints after the run has ended.", "--keep-checkpoints"),
]
MergeAdaptersOption = Annotated[
    bool,
    option(
        LEARNING,
        "If MODEL has adapters, add them to its weights before training. Without this option, they go on training.",
        "--merge-adapters",
    ),
]
ResumeFromOption = Annotated[
    str | None,
    option(RUN, "Same as --resume; the value is true, or OUT's last checkpoint.", metavar="PATH", hidden=True),
]
PushOption = Annotated[
    str | None,
    option(
        RUN,
        "Send OUT to the Hugging Face hub when training is done. vlm makes the repository before training begins.",
        metavar="ORG/NAME",
    ),
]
TrustOption = Annotated[
    bool,
    option(RUN, "Run the language model's own code from the directory of MODEL.", "--trust-remote-code"),
]
