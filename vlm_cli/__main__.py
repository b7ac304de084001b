"""`python -m vlm_cli`, and the program `vlm`."""

from __future__ import annotations

import os
from typing import NoReturn

from vlm_cli.interrupt import end_at_signals


def main() -> NoReturn:
    """Run `vlm`, and end the process with its exit code. From the first moment on, a signal ends it in one line.

    The process ends on the spot: while Python takes itself apart, signals have no handler.
    """
    end_at_signals()
    from vlm_cli.cli.app import main as run  # takes a fraction of a second

    os._exit(run())


if __name__ == "__main__":
    main()
