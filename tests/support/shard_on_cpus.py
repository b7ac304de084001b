"""`vlm`, in a process that spreads weights over CPUs, which Accelerate does for accelerators only.

`torchrun` starts this module in the place of `vlm_cli`. Accelerate then takes the CPUs for accelerators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env


@contextmanager
def shard() -> Iterator[None]:
    """Spread weights over CPUs inside the block if the environment asks for FSDP."""
    initialize = AcceleratorState.__init__

    def initialize_as_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = PartialState._shared_state
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
        if asked and shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, **kwargs)

    AcceleratorState.__init__ = initialize_as_accelerators  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = initialize  # type: ignore[method-assign]


if __name__ == "__main__":
    from vlm_cli.__main__ import main

    with shard():
        main()
