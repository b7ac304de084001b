"""A copy of a process of the tests can train, whatever ran in the process before."""

from __future__ import annotations

import os

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def learn() -> None:
    torch.ones(2, requires_grad=True).sum().backward()


def test_a_copy_trains_after_fake_tensors() -> None:
    with FakeTensorMode():
        torch.ones(2)
    learn()
    pid = os.fork()
    if pid == 0:
        try:
            learn()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
