"""What the tests share: tiny models, files on disk, slow references, and how to read what is printed.

A test imports from here and from no other test.
"""

from __future__ import annotations

from pathlib import Path

#: The folder of the checkout.
ROOT = Path(__file__).resolve().parents[2]
