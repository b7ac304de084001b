"""The types of language model that Transformers knows, read from its source so that nothing has to be imported."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from vlm_cli.composition import UNSUITABLE_LANGUAGE_MODELS

__all__ = ["suitable_language_models", "unsuitable_language_models"]


def suitable_language_models() -> dict[str, str]:
    """Return the types that can be the language model of a VLM, and the class of each."""
    return {name: x for name, x in _causal_types().items() if name not in UNSUITABLE_LANGUAGE_MODELS}


def unsuitable_language_models() -> dict[str, str]:
    """Return the types of AutoModelForCausalLM that cannot be the language model of a VLM, and the reason of each."""
    return {name: UNSUITABLE_LANGUAGE_MODELS[name] for name in _causal_types() if name in UNSUITABLE_LANGUAGE_MODELS}


def _causal_types() -> dict[str, str]:
    """Return the types of AutoModelForCausalLM and their classes.

    Example: {"afmoe": "AfmoeForCausalLM", "apertus": "ApertusForCausalLM", ...}
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            assert isinstance(node.value, ast.Call)
            return dict(sorted(ast.literal_eval(node.value.args[0])))
    return {}
