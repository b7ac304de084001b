"""Language models whose Python code comes with their weights.

vlm runs this code only if the user trusts it, and writes it into the directories that it builds.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlm_cli.shim import SHIM_FILE

__all__ = ["adopt_from_config", "adopt_from_directory", "has_own_code", "write_code"]

_MODULES = "transformers_modules"  # Transformers' package of fetched code


def adopt_from_config(config: PreTrainedConfig, location: str, **keywords: Any) -> None:
    """Register a language model's own classes with Transformers, if its configuration came with code.

    Args:
        config: of the language model.
        location: directory or hub id that holds the code.
        keywords: `revision`, … of Transformers.
    """
    reference = (getattr(config, "auto_map", None) or {}).get(AutoModelForCausalLM.__name__)
    if reference is not None and type(config).__module__.startswith(_MODULES):
        _adopt(type(config), reference, location, keywords)


def adopt_from_directory(text_config: dict[str, Any], name: str, **keywords: Any) -> None:
    """Register the classes of a language model whose code is in a directory or hub id that `vlm build` wrote.

    Call it only if the user trusts the code.

    Args:
        text_config: configuration of the language model.
        name: directory or hub id of the VLM.
        keywords: `revision`, … of Transformers.
    """
    references = text_config.get("auto_map") or {}
    if text_config.get("model_type") in CONFIG_MAPPING or AutoConfig.__name__ not in references:
        return
    config = get_class_from_dynamic_module(references[AutoConfig.__name__], name, **keywords)
    _adopt(config, references[AutoModelForCausalLM.__name__], name, keywords)


def _adopt(config: type[PreTrainedConfig], reference: str, location: str, keywords: dict[str, Any]) -> None:
    model = add_generation_mixin_to_remote_model(get_class_from_dynamic_module(reference, location, **keywords))
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def has_own_code(lm: PreTrainedModel, tokenizer: Any) -> bool:
    """Say whether a language model or its tokenizer is of a class that came with its weights, and runs by now."""
    return any(type(x).__module__.startswith(_MODULES) for x in (lm.config, tokenizer))


def write_code(lm: PreTrainedModel, out: Path) -> None:
    """Copy a language model's own code, if it has any, into the directory `out`, and make its config refer to it."""
    if not has_own_code(lm, None):
        return
    lm.config.auto_map = {key: str(x).rpartition("--")[2] for key, x in lm.config.auto_map.items()}
    for owner in (type(lm.config), *type(lm).__mro__):
        module = sys.modules[owner.__module__]
        if owner.__module__.startswith(_MODULES) and module.__file__:
            for file in Path(module.__file__).parent.glob("*.py"):
                if file.name not in ("__init__.py", SHIM_FILE):
                    shutil.copy(file, out / file.name)
