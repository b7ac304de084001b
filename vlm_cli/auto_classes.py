"""Let Transformers' `Auto…` classes find the classes of a VLM after `import vlm_cli`, which imports neither of the two.

Transformers asks its tables for the type "vlm" when it reads a config.json, and for the class of a processor by name.
The first such question imports our classes, which register themselves (`vlm_cli/processor.py`).
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["find_on_demand"]

#: Transformers' modules with tables -> the table.
_TABLES = {
    "transformers.models.auto.configuration_auto": "CONFIG_MAPPING",
    "transformers.models.auto.processing_auto": "PROCESSOR_MAPPING",
    "transformers.models.auto.image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
}
_TYPE = "vlm"


class _Added(dict[Any, Any]):
    """What others added to a table. A question for our type, or for every class by its name, imports our classes."""

    are_found = False

    def __contains__(self, key: object) -> bool:
        if key == _TYPE:
            self._find()
        return super().__contains__(key)

    def _find(self) -> None:
        if not self.are_found:
            self.are_found = True
            importlib.import_module("vlm_cli.processor")


class _AddedClasses(_Added):
    """The same for processors, which Transformers looks for by the name of their class."""

    def values(self) -> Any:
        self._find()
        return super().values()

    def items(self) -> Any:
        self._find()
        return super().items()


class _Finder(MetaPathFinder):
    """Changes each table as soon as Transformers' module with the table has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _TABLES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_change(module: ModuleType) -> None:
                run(module)
                _change(module)

            spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


def _change(module: ModuleType) -> None:
    """Replace what others added to a module's table by an object that finds our classes."""
    name = _TABLES[module.__name__]
    table = getattr(module, name, None)
    added = getattr(table, "_extra_content", None)
    if table is not None and isinstance(added, dict) and not isinstance(added, _Added):
        table._extra_content = (_Added if name == "CONFIG_MAPPING" else _AddedClasses)(added)


def find_on_demand() -> None:
    """Let Transformers import our classes when a file asks for them; nothing is imported now."""
    for name in _TABLES:
        if (module := sys.modules.get(name)) is not None:
            _change(module)
    sys.meta_path.insert(0, _Finder())
