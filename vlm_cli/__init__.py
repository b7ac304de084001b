"""Compose, build, run, train and export vision-language models.

Each name loads on first use, so that importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_cli.auto_classes import find_on_demand
from vlm_cli.version import __version__

if TYPE_CHECKING:
    from vlm_cli.checkpoint.building import BuildResult, build, build_from_checkpoint
    from vlm_cli.checkpoint.create import create, plan
    from vlm_cli.checkpoint.export.formats import export_model
    from vlm_cli.checkpoint.published.importing import import_checkpoint
    from vlm_cli.checkpoint.saving import save, save_delta
    from vlm_cli.composition import Composition, CompositionRequest
    from vlm_cli.modeling.acceleration import accelerate
    from vlm_cli.modeling.config import VLMConfig
    from vlm_cli.modeling.fusion.cross_attention import VLMWithCrossAttention
    from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.models import load
    from vlm_cli.processor import VLMProcessor


_HOMES = {
    "BuildResult": "vlm_cli.checkpoint.building",
    "Composition": "vlm_cli.composition",
    "CompositionRequest": "vlm_cli.composition",
    "VLM": "vlm_cli.modeling.vlm",
    "VLMConfig": "vlm_cli.modeling.config",
    "VLMProcessor": "vlm_cli.processor",
    "VLMWithCrossAttention": "vlm_cli.modeling.fusion.cross_attention",
    "VLMWithLanguageStream": "vlm_cli.modeling.fusion.language_stream",
    "accelerate": "vlm_cli.modeling.acceleration",
    "build": "vlm_cli.checkpoint.building",
    "build_from_checkpoint": "vlm_cli.checkpoint.building",
    "create": "vlm_cli.checkpoint.create",
    "export_model": "vlm_cli.checkpoint.export.formats",
    "import_checkpoint": "vlm_cli.checkpoint.published.importing",
    "load": "vlm_cli.models",
    "plan": "vlm_cli.checkpoint.create",
    "save": "vlm_cli.checkpoint.saving",
    "save_delta": "vlm_cli.checkpoint.saving",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


find_on_demand()
