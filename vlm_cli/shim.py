"""`vlm_shim.py`: the file in a model's directory through which Transformers finds the classes of vlm.

    AutoProcessor.from_pretrained(DIR, trust_remote_code=True)

`config.json` and `processor_config.json` name classes of this file as `auto_map`. Transformers runs the file if the
user trusts it, and the file imports the installed package. vlm itself knows its classes and never runs the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["CONFIG_CLASSES", "PROCESSOR_CLASSES", "SHIM_FILE", "is_shim", "write_shim"]

_MODULE = "vlm_shim"
SHIM_FILE = f"{_MODULE}.py"

#: `auto_map` of config.json and of processor_config.json: an `Auto…` class of Transformers -> the class for it.
CONFIG_CLASSES = {
    "AutoConfig": f"{_MODULE}.VLMConfig",
    "AutoModelForImageTextToText": f"{_MODULE}.VLM",
    "AutoModelForMultimodalLM": f"{_MODULE}.VLM",
}
PROCESSOR_CLASSES = {"AutoProcessor": f"{_MODULE}.VLMProcessor"}

_TEXT = '''\
"""Lets Transformers open this directory with trust_remote_code=True. The classes are those of the package vlm-cli."""

try:
    from vlm_cli import VLM, VLMConfig, VLMProcessor
except ModuleNotFoundError as error:
    if error.name != "vlm_cli":
        raise
    raise ImportError("the package vlm-cli opens this model, and it is not installed: pip install vlm-cli") from None

__all__ = ["VLM", "VLMConfig", "VLMProcessor"]
'''


def is_shim(auto_map: Any) -> bool:
    """Tell whether an `auto_map` names classes of `vlm_shim.py` alone, as vlm writes it."""
    known = CONFIG_CLASSES | PROCESSOR_CLASSES
    return isinstance(auto_map, dict) and all(known.get(key) == name for key, name in auto_map.items())


def write_shim(folder: Path) -> None:
    """Write the file into a directory."""
    (folder / SHIM_FILE).write_text(_TEXT, encoding="utf-8")
