"""The files that say how a VLM prepares images, and those of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_cli.checkpoint.schemas.reading import read_file
from vlm_cli.checkpoint.schemas.tokenizer import check_tokenizer
from vlm_cli.checkpoint.schemas.vision import PREPROCESS_OF_ANY
from vlm_cli.composition import read_tiling
from vlm_cli.errors import CompositionError
from vlm_cli.schema import Kind, check, mapping, optional, text

__all__ = ["check_processor_files"]


def _find_tiling_problems(data: Any, key: str) -> Iterator[str]:
    """Find what keeps the section `tiling` of an image processor from being one."""
    try:
        read_tiling(data)
    except CompositionError as error:
        yield from (f"{key.removesuffix('tiling')}{problem}" for problem in error.problems)


_TILING = Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_tiling_problems)
_IMAGE_PROCESSOR = mapping(
    {"preprocess": PREPROCESS_OF_ANY}, {"image_processor_type": text(most=200), "tiling": optional(_TILING)}
)


def check_processor_files(name: str, **keywords: Any) -> None:
    """Check the files that describe how a VLM prepares images and reads texts.

    Raises:
        CheckpointError: naming file and key.
    """
    data = read_file(name, "processor_config.json", keywords)
    if data is not None and "image_processor" in data:
        check(data, mapping({"image_processor": _IMAGE_PROCESSOR}), f"processor_config.json of {name!r}")
    elif (own := read_file(name, "preprocessor_config.json", keywords)) is not None:
        check(own, _IMAGE_PROCESSOR, f"preprocessor_config.json of {name!r}")
    elif data is not None:
        check(data, mapping({"image_processor": _IMAGE_PROCESSOR}), f"processor_config.json of {name!r}")
    check_tokenizer(name, **keywords)
