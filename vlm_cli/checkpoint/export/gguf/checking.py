"""Check that llama.cpp can hold a model, before its weights are read."""

from __future__ import annotations

from vlm_cli.checkpoint.export.gguf.language_models import find_language_problems
from vlm_cli.checkpoint.export.gguf.projectors import PROJECTORS, find_projector
from vlm_cli.checkpoint.export.gguf.towers import build_empty_tower, find_tower_problems, read_tower
from vlm_cli.errors import UsageError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["check_gguf"]


def check_gguf(config: VLMConfig) -> None:
    """Check that a model can be written as GGUF files for llama.cpp.

    Raises:
        UsageError: naming every setting that does not fit, and what is possible.
    """
    parts = config.composition
    problems = find_language_problems(config.text_config)
    if getattr(parts.language_model, "head_bias", False):
        problems.append("language_model.head_bias is set; the head would have to be without one.")
    visual = build_empty_tower(config)
    tower_problems = find_tower_problems(visual, config)
    problems += tower_problems
    if parts.fusion.type != "language-stream":
        problems.append(f"fusion is {parts.fusion.type}; it would have to be language-stream.")
    if not tower_problems:
        name, found = find_projector(config, read_tower(visual, config))
        problems += [f"as {name}, {problem}" for problem in found]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        known = "; ".join(f"{name}: {x.summary}" for name, x in PROJECTORS.items())
        raise UsageError(f"llama.cpp cannot hold this model:{lines}\nIts projectors that vlm writes: {known}.")
