"""Keep other libraries' advice and progress bars off the terminal. What matters reaches the user as an error."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils import logging as transformers_logging

__all__ = ["quiet_libraries", "silence_libraries"]

#: The root logger "", to which OpenCLIP writes, and loggers with a level of their own. `_pytree` warns of torchao's
#: classes, where Transformers imports torchao.
_LOGGERS = ("", "open_clip", "torch.utils.cpp_extension", "torch.utils._pytree")

#: Advice of `torch.load` about files that it then refuses: to report them to torch's authors, or to run their code.
_TORCH_ADVICE = "Detected pickle protocol|'torch.load' received a zip file"


def silence_libraries() -> None:
    """Silence other libraries until the program ends, as each command does."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # and the hub's, which a terminal shows while a file is downloaded
    if sys.stderr is not None and sys.stderr.isatty():
        enable_progress_bars()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=_TORCH_ADVICE)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence other libraries inside the block."""
    verbosity = transformers_logging.get_verbosity()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    transformers_logging.set_verbosity_error()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
