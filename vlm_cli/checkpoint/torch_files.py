"""Say why torch refused a file of weights."""

from __future__ import annotations

import re

from vlm_cli.errors import first_line

__all__ = ["describe_load_error"]


def describe_load_error(error: BaseException) -> str:
    """Say in a few words why a file of weights could not be loaded.

    `torch.load(weights_only=True)` refuses files that hold code, and then explains at length how to run the code
    anyway. vlm does not pass this advice on.

    >>> describe_load_error(ValueError("Weights only load failed. Unsupported global: GLOBAL os.system"))
    'it holds os.system, which is code and no tensor'
    >>> describe_load_error(ValueError("no such thing.\\nTry another."))
    'no such thing'
    """
    refused = re.search(r"Weights only load failed.*?(?:GLOBAL|class|global) ([\w.]+)", str(error), re.DOTALL)
    return f"it holds {refused[1]}, which is code and no tensor" if refused else first_line(error)
