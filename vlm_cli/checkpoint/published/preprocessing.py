"""How a published checkpoint prepares images: Transformers' `preprocessor_config.json` in OpenCLIP's terms.

Each setting is read, has no effect, or is refused by name: one that is ignored would change pixels in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.parts.openclip import complete_preprocessing
from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import read_json
from vlm_cli.preprocessing import CROP_DOWN
from vlm_cli.schema import show

__all__ = ["PADS_TO_SQUARES", "pads_to_squares", "read_image_settings", "read_preprocessing"]

#: PIL's number of a resampling filter -> OpenCLIP's word.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_FILES = ("processor_config.json", "preprocessor_config.json")
_READ = {
    *("image_mean", "image_std", "resample", "size", "crop_size", "image_size"),
    *("do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize", "do_pad"),
}
#: Settings without an effect: names of classes, formats of tensors, and RGB, which OpenCLIP makes of every image.
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"),
    *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square"),
    *("do_convert_rgb", "image_num_channels", "image_seq_length", "image_seq_len", "num_query_tokens"),
}

PADS_TO_SQUARES = (
    "The model was trained on images padded to squares, and OpenCLIP's tower crops the middle. Pad images that are far "
    "from square."
)


def read_preprocessing(
    folder: Path | None,
    image_size: int,
    *,
    resize_mode: str = "shortest",
    like: Mapping[str, Any] | None = None,
    also_read: Collection[str] = (),
) -> dict[str, Any]:
    """Turn Transformers' `preprocessor_config.json` into OpenCLIP's description of how images are prepared.

    Args:
        folder: where the file may be; without a file, images are prepared as for CLIP. None for no folder.
        image_size: pixels.
        resize_mode: OpenCLIP's word for how images are resized, if the file does not say it.
        like: other settings, in OpenCLIP's words, if the file does not say them; None for those of CLIP.
        also_read: settings that the caller reads, such as those that say how pictures are cut.

    Raises:
        CheckpointError: for a setting that OpenCLIP does not have.
    """
    given: dict[str, Any] = {"size": image_size, "resize_mode": resize_mode, **(like or {})}
    more: dict[str, Any] = {}
    for name, data in _read_files(folder):
        _check({key: x for key, x in data.items() if key not in also_read}, name, image_size)
        for openclip, transformers in (("mean", "image_mean"), ("std", "image_std")):
            if transformers in data:
                given[openclip] = tuple(data[transformers])
        if data.get("do_normalize") is False:
            given |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        if "resample" in data:
            given["interpolation"] = _INTERPOLATIONS[data["resample"]]
        if isinstance(data.get("size"), Mapping):
            edge = data["size"].get("shortest_edge")
            given["resize_mode"] = "shortest" if edge else "squash"
            more = {"shortest_edge": edge} if edge and edge != image_size else {}
    whole = complete_preprocessing(given)
    return whole | CROP_DOWN | more if whole["resize_mode"] == "shortest" else whole


def read_image_settings(folder: Path | None) -> dict[str, Any]:
    """Read the settings of the image processor as they stand in its files; those of a later file count."""
    return {key: x for _, data in _read_files(folder) for key, x in data.items()}


def pads_to_squares(folder: Path | None) -> bool:
    """Say whether images are padded to squares, which OpenCLIP does not do; `PADS_TO_SQUARES` tells the user."""
    return any(data.get("do_pad") for _, data in _read_files(folder))


def _read_files(folder: Path | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Read the settings of the image processor, with the name of each file that holds some."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in _FILES:
        if folder is None or not (file := folder / name).is_file():
            continue
        data: Any = read_json(file)
        if name == "processor_config.json":
            data = data.get("image_processor") or {}
        if data:
            found.append((name, data))
    return found


def _check(data: Mapping[str, Any], name: str, image_size: int) -> None:
    """Refuse settings of an image processor that OpenCLIP does not have.

    Raises:
        CheckpointError: naming the setting.
    """

    def refuse(key: str, possible: str) -> CheckpointError:
        return CheckpointError(f"{name} sets {key}={show(data[key])}; vlm prepares images with {possible}.")

    for key, value in data.items():
        # A setting that is off, as new releases write for what a processor does not do, has no effect.
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, 0, [], {}):
            raise refuse(key, "none of this setting")
    if data.get("resample", 3) not in _INTERPOLATIONS:
        filters = ", ".join(f"{number} ({word})" for number, word in _INTERPOLATIONS.items())
        raise CheckpointError(f"{name} resizes images with filter {data['resample']}; OpenCLIP has {filters}.")
    for key in ("do_resize", "do_rescale"):
        if data.get(key, True) is not True:
            raise refuse(key, f"{key}=true")
    if not isclose(data.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-4):
        raise refuse("rescale_factor", "1/255")
    if data.get("do_center_crop", True) is False and _sides(data.get("size"))[1]:
        raise refuse("do_center_crop", "a crop of the middle where the shortest edge is resized")
    for key in ("size", "image_size", *(["crop_size"] if data.get("do_center_crop", True) else [])):
        sides, is_edge = _sides(data.get(key))
        unknown = isinstance(value := data.get(key), Mapping) and value.get("longest_edge") is not None
        if unknown or any(side < image_size if is_edge else side != image_size for side in sides):
            raise refuse(key, f"the {image_size} pixels of the vision encoder")


def _sides(size: Any) -> tuple[list[int], bool]:
    """Return the pixels of a size, and whether they are those of the shortest edge: 224, {"height": …} and so on."""
    if isinstance(size, Mapping):
        return [x for x in size.values() if x is not None], size.get("shortest_edge") is not None
    if isinstance(size, (list, tuple)):
        return [*size], False
    return ([] if size is None else [size]), False
