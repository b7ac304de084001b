"""Every causal language model of Transformers with both fusions, and every kind of vision encoder.

python -m benchmarks.compatibility              runs all of them and writes docs/compatibility.md
python -m benchmarks.compatibility gemma        runs those with "gemma" in their names, and prints differences
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from transformers.utils import logging as transformers_logging

from benchmarks.compatibility.document import FUSIONS, PAGE, LanguageModelRow, page, versions
from benchmarks.compatibility.encoders import check_family, check_vision_type, timm_families, vision_types
from benchmarks.compatibility.language_models import model_types, tiny_vlm
from benchmarks.compatibility.towers import check_tower, towers
from vlm_cli.doctor import check_invariants


def check_type(model_type: str) -> LanguageModelRow:
    """Run every check on a type of language model, with both fusions."""
    return LanguageModelRow(
        model_type, {fusion: list(check_invariants(tiny_vlm(model_type, fusion))) for fusion in FUSIONS}
    )


def main(
    word: Annotated[str, typer.Argument(metavar="WORD", help="Check only names with WORD; write no page.")] = "",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every measured difference, as JSON.")
    ] = None,
) -> None:
    """Check every language model type with both fusions, and every tower."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    types = [name for name in model_types() if word in name]
    rows = [check_type(name) for name in track(types, "language models", disable=not sys.stderr.isatty())]
    names = [name for name in towers() if word in name]
    found = [check_tower(name) for name in track(names, "towers", disable=not sys.stderr.isatty())]
    encoders = [check_vision_type(name) for name in vision_types() if word in name]
    families = [check_family(name) for name in timm_families() if word in name]
    data = {
        "versions": versions(),
        "seconds": round(time.monotonic() - started),
        "language_models": {
            row.model_type: {fusion: [f.to_dict() for f in findings] for fusion, findings in row.findings.items()}
            for row in rows
        },
        "towers": {row.name: dataclasses.asdict(row) for row in found},
        "vision_models": {row.name: dataclasses.asdict(row) for row in encoders},
        "timm_families": {row.name: dataclasses.asdict(row) for row in families},
    }
    if output is not None:
        output.write_text(json.dumps(data, indent=2), encoding="utf-8")
    if not word:
        PAGE.write_text(page(rows, found, encoders, families), encoding="utf-8")
        print(f"{PAGE.name}: {len(rows)} types, {len(found)} towers, {data['seconds']} s")
        return
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    typer.run(main)
