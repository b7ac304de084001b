"""Run checks on a model and leave the model as it was."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

import vlm_cli.doctor.checks  # noqa: F401  (registers them)
from vlm_cli.doctor.check import CHECKS
from vlm_cli.doctor.finding import Finding
from vlm_cli.doctor.float32 import judge_in_both
from vlm_cli.doctor.gates import opened_gates
from vlm_cli.doctor.subject import BareLanguageModel, WholeModel, find_special_ids
from vlm_cli.doctor.tf32 import without_tf32
from vlm_cli.interrupt import removed_at_end
from vlm_cli.modeling.vlm import VLM
from vlm_cli.renames import remove_tree

__all__ = ["QUICK", "check_invariants"]

#: Names of the quick checks.
QUICK = tuple(name for name, check in CHECKS.items() if check.quick)
_BARE_SEEDS = 4  # prompts for the bare language model; the worst counts


def check_invariants(
    model: VLM,
    names: Sequence[str] = tuple(CHECKS),
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Run checks on a model and yield each finding. Afterwards the model is as it was.

    The gates of a new model are closed. They are open while a check runs, so that the check can see media. On a GPU,
    float32 is not computed in TF32 while a check runs.

    Args:
        model: any `VLM`.
        names: of `CHECKS`.
        tokenizer: of the model; text then holds its special tokens too. Without one, it holds those that the language
            model's configuration names.
        seed: of prompts and images.
        progress: receives what a check proves, before the check runs.
    """
    workspaces = removed_at_end(lambda: Path(tempfile.mkdtemp(prefix="vlm-doctor-")), remove_tree)
    with _evaluation_mode(model), workspaces as workspace:
        subject = WholeModel(model, seed, workspace, find_special_ids(model, tokenizer))
        bare = [BareLanguageModel(model, seed + k) for k in range(_BARE_SEEDS)]
        for name in names:
            progress(CHECKS[name].proves_for(model))
            started = time.monotonic()
            with _quiet_transformers(), without_tf32(), opened_gates(model):
                finding = judge_in_both(CHECKS[name], subject, bare)
            yield replace(finding, seconds=round(time.monotonic() - started, 3))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards each module has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the warnings of Transformers about short random prompts, which no user ever sees."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
