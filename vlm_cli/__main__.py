"""`python -m vlm_cli`."""

import sys

from vlm_cli.cli.app import main

sys.exit(main())
