"""The processes that share a run, if `torchrun` or `accelerate launch` started more than one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from vlm_cli.errors import VLMError

__all__ = ["Processes", "asks_for_sharding", "is_first_process"]

_T = TypeVar("_T")


def is_first_process() -> bool:
    """Tell whether this process is the only one of the run, or the first of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


def asks_for_sharding() -> bool:
    """Tell whether the launcher asks to spread the weights over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class Processes:
    """The processes of a run, seen from one of them.

    Args:
        use_cpu: the processes train on the CPU.
    """

    def __init__(self, use_cpu: bool) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=use_cpu, backend="gloo" if use_cpu else None)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def main_first(self, action: Callable[[], _T]) -> _T:
        """Run an action in the main process and then in the others, and return its result.

        If the action fails in the main process, the others end without a message, because one message is enough.
        """
        result = self.main_only(action)
        return cast(_T, result) if self.is_main else action()

    def main_only(self, action: Callable[[], _T]) -> _T | None:
        """Run an action in the main process while the others wait. Return its result; None in the others."""
        if self.count == 1:
            return action()
        failure: list[Any] = [0]
        result: _T | None = None
        error: VLMError | None = None
        if self.is_main:
            try:
                result = action()
            except VLMError as caught:
                error, failure = caught, [caught.exit_code]
        torch.distributed.broadcast_object_list(failure, src=0)
        if error is not None:
            raise error
        if failure[0]:
            raise SystemExit(failure[0])
        return result

    def is_broken_by(self, error: RuntimeError) -> bool:
        """Tell whether an error says that another process of the run has ended."""
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")
        return self.count > 1 and (
            isinstance(error, torch.distributed.DistError) or any(x in str(error) for x in words)
        )

    def end(self) -> None:
        """Release what the processes used to talk to each other."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
