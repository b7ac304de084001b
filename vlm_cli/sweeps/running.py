"""Perform the runs of a sweep: one at a time, several at once, or on the machines of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from vlm_cli.errors import UsageError
from vlm_cli.schema import show
from vlm_cli.sweeps.performing import Launch, Outcome, perform
from vlm_cli.sweeps.runs import Run

__all__ = ["Engine", "run_all"]


@dataclass(frozen=True)
class Engine:
    """Where runs are performed.

    Attributes:
        name: "local" in processes of this machine, or "ray".
        jobs: runs at once.
        cpus: that Ray reserves for a run.
        gpus: that Ray reserves for a run.

    Raises:
        UsageError: for another name, or if Ray is missing.
    """

    name: Literal["local", "ray"] | str = "local"
    jobs: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("local", "ray"):
            raise UsageError(f"--engine knows local and ray, got {show(self.name)}.")
        if self.name == "local" and (self.cpus, self.gpus) != (1.0, 0.0):
            flag = "--job-cpus" if self.cpus != 1.0 else "--job-gpus"
            raise UsageError(f"{flag} has no effect without --engine ray.")
        if self.name == "ray" and find_spec("ray") is None:
            raise UsageError("--engine ray needs the package ray, which is missing: pip install 'vlm-cli[ray]'")


def run_all(
    runs: Sequence[Run], engine: Engine, launch: Launch, begun: Callable[[Run], None]
) -> Iterator[tuple[Run, Outcome]]:
    """Perform runs, and yield each when it has ended. After one that found the disk full, no other begins.

    Args:
        runs: in the order in which they begin.
        engine: where.
        launch: runs a command.
        begun: called when a run begins.
    """
    if engine.name == "ray":
        yield from _run_by_ray(runs, engine, launch, begun)
        return
    left = list(runs)
    with ThreadPoolExecutor(engine.jobs) as pool:
        active: dict[Future[Outcome], Run] = {}
        while left or active:
            while left and len(active) < engine.jobs:
                run = left.pop(0)
                begun(run)
                active[pool.submit(perform, run, launch)] = run
            ended, _ = wait(active, return_when=FIRST_COMPLETED)
            for future in ended:
                outcome = future.result()
                left = [] if outcome.is_full else left
                yield active.pop(future), outcome


def _run_by_ray(
    runs: Sequence[Run], engine: Engine, launch: Launch, begun: Callable[[Run], None]
) -> Iterator[tuple[Run, Outcome]]:
    """Let Ray choose the machine of each run. All machines must see the same files."""
    ray = _start_ray()
    remote = ray.remote(perform).options(num_cpus=engine.cpus, num_gpus=engine.gpus, max_retries=0)
    left = list(runs)
    active: dict[Any, Run] = {}
    while left or active:
        while left and len(active) < engine.jobs:
            run = left.pop(0)
            begun(run)
            active[remote.remote(run, launch)] = run
        ended, _ = ray.wait(list(active), num_returns=1)
        for reference in ended:
            outcome = _result_of(ray, reference)
            left = [] if outcome.is_full else left
            yield active.pop(reference), outcome


def _result_of(ray: Any, reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except Exception as error:  # the process or the machine of the run is gone
        return Outcome(
            f"Ray lost the run: {str(error).strip().splitlines()[-1] if str(error).strip() else type(error)}"
        )
    return outcome


def _start_ray() -> Any:
    """Start Ray, or join the cluster that RAY_ADDRESS names."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return ray
