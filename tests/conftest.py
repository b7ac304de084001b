"""One thread and no network: tests are small, and share their machine."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch

torch.set_num_threads(1)
# A shell starts its background jobs with Ctrl-C ignored, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
