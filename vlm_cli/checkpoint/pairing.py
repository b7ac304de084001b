"""Check that the files of a processor belong to the configuration beside them, before the model reads an image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm_cli.errors import CheckpointError, CompositionError, explain_reading
from vlm_cli.preprocessing import make_preprocessing
from vlm_cli.prompt import Text
from vlm_cli.tiling import check_tiling

if TYPE_CHECKING:
    from vlm_cli.image_processor import OpenCLIPImageProcessor
    from vlm_cli.modeling.config import VLMConfig
    from vlm_cli.processor import VLMProcessor

__all__ = ["check_pair"]


def check_pair(config: VLMConfig, processor: VLMProcessor, name: str) -> None:
    """Check that a processor prepares what a model reads.

    Args:
        config: of the model.
        processor: from the same directory.
        name: directory or hub id.

    Raises:
        CheckpointError: naming what differs.
    """
    if problems := list(_find_problems(config, processor)):
        raise CheckpointError(
            f"the files in {name!r} do not belong together: {' '.join(problems)} If you changed one, restore it."
        )


def _find_problems(config: VLMConfig, processor: VLMProcessor) -> Iterator[str]:
    tokenizer, images = processor.tokenizer, processor.image_processor
    if tokenizer.pad_token_id is None:
        yield "tokenizer_config.json names no pad_token."
    if processor.media_token_id != config.media_token_id:
        yield (
            f"the tokenizer gives <image> the id {processor.media_token_id}, and config.json says "
            f"{config.media_token_id}."
        )
    elif wrong := [t for t, i in config.added_ids.items() if tokenizer.convert_tokens_to_ids(t) != i]:
        yield (
            f"the tokenizer gives {wrong[0]!r} the id {tokenizer.convert_tokens_to_ids(wrong[0])}, and with the "
            f"first_added_id of config.json it is {config.added_ids[wrong[0]]}."
        )
    elif not _reads_media(processor):
        yield "the tokenizer does not read <image> as one token of its own; <image> must not be special."
    if (problem := _preprocessing_problem(images)) is not None:
        yield f"processor_config.json describes no preprocessing that vlm has: {problem}."
        return
    vision = config.vision_config
    for given in (vision.get("preprocess", {}).get("size"), vision.get("vision_cfg", {}).get("image_size")):
        expected = (given, given) if isinstance(given, int) else tuple(given or ())
        if expected and expected != images.frame_shape[1:]:
            yield (
                f"processor_config.json makes images of {' x '.join(map(str, images.frame_shape[1:]))} pixels, and "
                f"config.json says {' x '.join(map(str, expected))}."
            )
            return
    if images.tiling != config.composition.tiling:
        yield "processor_config.json and config.json have different settings under tiling."
    elif (problem := _tiling_problem(images)) is not None:
        yield problem


def _tiling_problem(images: OpenCLIPImageProcessor) -> str | None:
    """Say why the tiling does not fit the vision encoder; None if it does."""
    try:
        check_tiling(images.tiling, *images.preprocessing.tiles)
    except CompositionError as error:
        return str(error)
    return None


def _reads_media(processor: VLMProcessor) -> bool:
    """Say whether an image between two words becomes one media token."""
    try:
        return processor.encode([Text("a "), None, Text(" b")]).count(processor.media_token_id) == 1
    except AssertionError:  # it lost the token
        return False


def _preprocessing_problem(images: OpenCLIPImageProcessor) -> str | None:
    """Say why no preprocessing can be made of the settings; None if it can."""
    try:
        make_preprocessing(images.preprocess_config)
    except Exception as error:
        return explain_reading(error)
    return None
