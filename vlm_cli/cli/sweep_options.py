"""The options of `vlm sweep` that `vlm train` and `vlm eval` do not have."""

from __future__ import annotations

from typing import Annotated

from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_settings
from vlm_cli.cli.options import OUTPUT

__all__ = ["CsvOption", "MarkdownOption", "SetOption", "TrustOption"]

GRID = "Compositions"  # heading in --help

SetOption = Annotated[
    list[str] | None,
    option(
        GRID,
        "Give a setting of the composition each of these values in turn, such as vision_tokenizer=linear,perceiver or "
        "fusion.every=1,2; train.NAME is a setting of `vlm train`. One value holds everywhere. Several --set make a "
        "grid. A value is YAML: {type: perceiver, num_latents: 16}.",
        metavar="NAME=VALUE,…",
        autocompletion=complete_settings,
    ),
]
TrustOption = Annotated[
    bool, option(GRID, "Run Python code that comes with the language models.", "--trust-remote-code")
]
CsvOption = Annotated[bool, option(OUTPUT, "Print the table as comma-separated values.", "--csv")]
MarkdownOption = Annotated[bool, option(OUTPUT, "Print the table in Markdown.", "--markdown")]
