"""The processes of a sweep: each runs one command of vlm, and ends with the sweep that started it.

`python -m vlm_cli.cli.sweep_process PID WORD…` is `vlm WORD…` for the process PID. A sweep that is killed can end
nothing, so its processes look by themselves whether it is there. A training then ends as after Ctrl-C, with a
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Launcher", "end_processes"]

_LOOK_EVERY = 0.5  # seconds
_ENDING = 120.0  # seconds that a training has to write a checkpoint

_running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Launcher:
    """Runs commands of vlm in processes of their own.

    Attributes:
        environment: variables that they get beside those of this process.
    """

    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, words: Sequence[str], log: Path, printed: Path | None) -> int:
        """Run a command, and return its exit code, or less than 0 if a signal ended it.

        Args:
            words: of the command, without `vlm`.
            log: what it says is added to this file; what it prints, too, if `printed` is None.
            printed: the file that gets what it prints.
        """
        command = [sys.executable, "-m", "vlm_cli.cli.sweep_process", str(os.getpid()), *words]
        with contextlib.ExitStack() as files:
            said = files.enter_context(log.open("ab"))
            out = said if printed is None else files.enter_context(printed.open("wb"))
            # A session of its own keeps Ctrl-C away: the sweep ends its processes, and says so once.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=said,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
            _running.add(process)
            try:
                return process.wait()
            finally:
                _running.discard(process)


def end_processes() -> None:
    """Let the processes of this sweep write what they have, and end."""
    running = list(_running)
    for process in running:
        with contextlib.suppress(OSError):
            process.send_signal(signal.SIGTERM)
    end = time.monotonic() + _ENDING
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))


def _end_with(parent: int) -> None:
    """End this process when another one, which started it, is gone."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv = ["vlm", *sys.argv[2:]]
    from vlm_cli.__main__ import main

    main()
