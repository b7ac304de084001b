"""From what a user named to a model: on the meta device for looking at, or loaded for running."""

from __future__ import annotations

import logging
import sys

import torch
from transformers.utils import logging as transformers_logging

from vlm_cli.checkpoint.create import plan
from vlm_cli.checkpoint.delta import DELTA_FILE
from vlm_cli.checkpoint.directory import (
    read_config,
    read_generation_config,
    read_processor,
    read_tensors,
)
from vlm_cli.composition import Composition
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor

__all__ = ["gate_values", "load_meta_model", "processor_of", "silence_libraries"]


def silence_libraries() -> None:
    """Keep other libraries' progress bars and advice off the terminal; what matters comes as an error."""
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    for name in ("open_clip", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)


def load_meta_model(
    chosen: Composition | str, *, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[VLM, torch.dtype, VLMProcessor | None]:
    """A model without weights.

    Returns:
        The model, the dtype that its weights have or would have, and its processor; None if it is not at hand.
    """
    silence_libraries()
    if isinstance(chosen, Composition):
        blueprint = plan(chosen, trust_remote_code=trust_remote_code, need_tokenizer=False)
        dtype = blueprint.config.get_text_config().dtype or torch.float32
        return blueprint.meta_model, dtype, blueprint.processor if blueprint.tokenizer else None
    config = read_config(chosen, trust_remote_code=trust_remote_code, **_hub(revision))
    with torch.device("meta"):
        model = VLM(config)
    model.generation_config = read_generation_config(chosen, **_hub(revision)) or model.generation_config
    return model, config.dtype or torch.float32, None


def processor_of(chosen: Composition | str, revision: str | None = None) -> VLMProcessor:
    """The processor of a built model.

    Raises:
        VLMError: if there is none.
    """
    if isinstance(chosen, Composition):
        raise LanguageModelError(
            f"language model {chosen.language_model.name!r} has no tokenizer. Give one: "
            "--set language_model.tokenizer=DIRECTORY_OR_HUB_ID"
        )
    return read_processor(chosen, **_hub(revision))


def gate_values(chosen: Composition | str, model: VLM, revision: str | None = None) -> dict[str, float]:
    """tanh of the gates, or its mean size where a gate is a vector; those of a directory are read from its files."""
    names = list(model.gates())
    if isinstance(chosen, Composition):
        return dict.fromkeys(names, 0.0)
    where = {"file": DELTA_FILE} if getattr(model.config, "backbones", None) else {}
    found = read_tensors(chosen, [f"fusion.{name}" for name in names], **where, **_hub(revision))
    opened = {name: x.float().tanh() for name, x in found.items()}
    return {name: float(x) if x.numel() == 1 else float(x.abs().mean()) for name, x in opened.items()}


def _hub(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}
