"""`python -m vlm_cli`, and the program `vlm`."""

from __future__ import annotations

import sys

from vlm_cli.interrupt import end_at_signals


def main() -> int:
    """Run `vlm` and return its exit code. From the first moment on, a signal ends it without a traceback."""
    end_at_signals()
    from vlm_cli.cli.app import main as run  # takes a fraction of a second

    return run()


if __name__ == "__main__":
    sys.exit(main())
