"""Parts of other packages in this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS


def forget_packages() -> None:
    """Let the registries look for packages again."""
    for registry in (VISION_ENCODERS, VISION_TOKENIZERS, FUSIONS):
        registry.__dict__.pop("_points", None)


@contextmanager
def packages_in(folder: Path) -> Iterator[None]:
    """Packages and their `*.dist-info`, as if they were installed for as long as the block runs."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.invalidate_caches()
        forget_packages()
        yield
    forget_packages()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
