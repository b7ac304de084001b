"""What the tests share: tiny models, files on disk, slow references, and how to read what is printed.

A test imports from this package and from no other test.
"""

from __future__ import annotations

from pathlib import Path

#: The folder of the checkout.
ROOT = Path(__file__).resolve().parents[2]


def seed_torch(seed: int) -> None:
    """Seed torch's CPU generator.

    `torch.manual_seed` gives the same numbers and takes a millisecond in a test: for each kind of accelerator that the
    machine lacks, it keeps a stack trace.
    """
    import torch

    torch.default_generator.manual_seed(seed)
