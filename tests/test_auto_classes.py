"""Transformers' tables find the classes of a VLM after `import vlm_cli`."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from vlm_cli import auto_classes
from vlm_cli.models import DEMO


def test_only_our_type_and_names_of_classes_import_our_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(importlib, "import_module", found.append)
    types, classes = auto_classes._Added({"other": 1}), auto_classes._AddedClasses({"other": 1})
    assert "other" in types and "llama" not in types and list(types.values()) == [1] and not found
    assert "vlm" not in types and "vlm" not in types
    assert found == ["vlm_cli.processor"]
    assert list(classes.values()) == [1] and list(classes.items()) == [("other", 1)]
    assert found == ["vlm_cli.processor"] * 2


_LOAD = """
import sys, vlm_cli
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import {name}
print(type({name}.from_pretrained({place!r})).__name__)
"""


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("AutoConfig", "VLMConfig"),
        ("AutoModelForImageTextToText", "VLMWithCrossAttention"),
        ("AutoProcessor", "VLMProcessor"),
        ("AutoImageProcessor", "OpenCLIPImageProcessor"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_auto_classes_in_a_fresh_process(name: str, found: str, is_first: bool) -> None:
    code = _LOAD.format(name=name, place=str(DEMO))
    if not is_first:
        code = f"from transformers import {name}\nimport vlm_cli\n{code.splitlines()[-1]}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == [found], result.stderr[-500:]
