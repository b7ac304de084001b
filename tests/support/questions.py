"""What the tests of this folder ask; the fixture `folder` draws the pictures, and `write` writes the records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

COLOURS = ("red", "lime", "blue", "white")
PROMPTS = (
    ("colour", "<image:red.png>Q: What colour? A:"),
    ("colour", "<image:lime.png>Q: What colour is it, if one may ask? A:"),
    ("few-shot", "<image:red.png> red.<image:blue.png> blue.<image:white.png>"),
    (None, "An image: <image:blue.png>"),
    ("colour", "<image:blue.png>Q: What colour? A:"),
    ("few-shot", "<image:lime.png> lime.<image:red.png>"),
)

Write = Callable[..., Path]
