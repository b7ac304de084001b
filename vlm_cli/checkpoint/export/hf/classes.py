"""The classes of Transformers that `vlm export --format hf` writes, in the order in which they are tried."""

from vlm_cli.checkpoint.export.hf.draft import HFClass
from vlm_cli.checkpoint.export.hf.llava import LLaVAClass

__all__ = ["CLASSES"]

#: A word for the class -> the class.
CLASSES: dict[str, HFClass] = {
    "llava": LLaVAClass(),
}
