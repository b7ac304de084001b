"""Each test here runs on a GPU where there is one. The long tests run it on the CPU, to show that it can pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlm_cli.doctor import without_tf32


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.matrix)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch finds none")
    with without_tf32():
        yield request.param
