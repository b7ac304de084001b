"""Vision models of Transformers by name: `hf:ORG/NAME`, `hf:ORG/NAME@REVISION` or `hf:DIRECTORY`.

Of a model that also reads text, the vision half is taken, and only its tensors are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.inside import check_folder
from vlm_cli.checkpoint.parts.hf_pixels import Pixels, read_pixels
from vlm_cli.checkpoint.parts.tower import RepositoryWeights, Tower
from vlm_cli.checkpoint.parts.vision_halves import find_plain_type, take_vision_half
from vlm_cli.checkpoint.whole import check_files
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import CheckpointError, UntrustedCodeError, VisionEncoderError, explain_reading
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.offline import use_cache_without_network
from vlm_cli.printable import count_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from vlm_cli.checkpoint.parts.hf_weights import VisionTensors

__all__ = ["check_hf_weights", "find_hf_tower", "load_hf_tower"]

_FORMS = "Give hf:ORG/NAME, hf:ORG/NAME@REVISION, or hf:DIRECTORY."
#: Settings that say where a configuration comes from, and nothing of the model.
_NO_SETTINGS = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def find_hf_tower(options: VisionEncoderOptions) -> Tower:
    """Find a vision model of Transformers: its configuration and its preprocessing, a few kB.

    Raises:
        VisionEncoderError: if there is no such directory or repository, or no vision model in it.
        UntrustedCodeError: if it needs code of its own.
    """
    if options.pretrained is not None:
        raise VisionEncoderError(
            f"vision encoder {options.name!r} brings its own weights, so pretrained={options.pretrained!r} means "
            "nothing to it. Leave it out; a branch, tag or commit stands after the name: hf:ORG/NAME@REVISION."
        )
    weights = _locate(options.name)
    config = take_vision_half(options.name, _load_config(options.name, weights))
    pixels = _load_pixels(options.name, weights)
    config, size = _fit_size(options, config, pixels)
    tower: dict[str, Any] = {
        "type": "hf",
        "config": {key: x for key, x in config.to_dict().items() if key not in _NO_SETTINGS},
        "vision_cfg": {"image_size": size[0] if size[0] == size[1] else [*size]},
        "preprocess": _complete(pixels.settings(size)),
    }
    notes: tuple[str, ...] = ()
    if pixels.skipped:
        notes = (
            f"The image processor of {options.name!r} also has {', '.join(pixels.skipped)}, which vlm leaves out: "
            f"images are {_describe(tower['preprocess'])}.",
        )
    depth = {} if options.depth is None else {"depth": options.depth}
    return Tower({**tower, **depth}, {}, weights, notes)


def _complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenCLIP's whole description of how images are prepared; settings that only vlm has stay."""
    from vlm_cli.checkpoint.parts.openclip import complete_preprocessing

    return {**settings, **complete_preprocessing(settings)}


def _describe(preprocess: Mapping[str, Any]) -> str:
    from vlm_cli.preprocessing import Preprocessing

    return Preprocessing(preprocess).describe()


# -- configuration -----------------------------------------------------------------------------------------------------


def _locate(name: str) -> RepositoryWeights:
    """Return the directory or the repository that a name means.

    Raises:
        VisionEncoderError: if it is neither.
    """
    place = name.removeprefix("hf:")
    folder = Path(os.path.expanduser(place))
    if place and folder.is_dir():
        try:
            check_folder(folder)
            check_files(folder)
        except CheckpointError as error:
            raise VisionEncoderError(str(error)) from None
        if not (folder / "config.json").is_file():
            raise VisionEncoderError(
                f"the directory {place!r} holds no vision model of Transformers: it has no config.json. {_FORMS}"
            )
        return RepositoryWeights(str(folder.absolute()))
    repository, at, revision = place.partition("@")
    if not is_hub_id(repository) or (at and not revision):
        raise VisionEncoderError(f"there is no directory {place!r}, and it is no id of a hub repository. {_FORMS}")
    use_cache_without_network()
    return RepositoryWeights(repository, revision or None)


def _load_config(name: str, weights: RepositoryWeights) -> PreTrainedConfig:
    """Load a configuration.

    Raises:
        VisionEncoderError: if it cannot be fetched or read.
        UntrustedCodeError: if it needs code of its own.
    """
    from vlm_cli.trust import load_config

    try:
        return load_config(weights.location, **_keywords(weights))
    except UntrustedCodeError as error:
        raise VisionEncoderError(
            f"{str(error).partition(' If you trust it')[0]} vlm runs no code of a vision encoder. Give a model whose "
            "type Transformers has."
        ) from None
    except Exception as error:
        raise VisionEncoderError(_cannot_read(name, weights, error)) from None


def _keywords(weights: RepositoryWeights) -> dict[str, Any]:
    return {} if weights.revision is None else {"revision": weights.revision}


def _cannot_read(name: str, weights: RepositoryWeights, error: BaseException) -> str:
    """Say why a vision model cannot be read, and what to do."""
    if Path(weights.location).is_dir():
        return f"cannot read the configuration of vision encoder {name!r}: {explain_reading(error)}."
    causes = _causes(error)
    if "GatedRepoError" in causes:
        return (
            f"vision encoder {name!r} is gated: its authors ask you to accept their terms at "
            f"https://huggingface.co/{weights.location}. Accept them there, run `hf auth login`, and try again."
        )
    if "RevisionNotFoundError" in causes:
        return (
            f"the repository {weights.location!r} has no revision {weights.revision!r}. Give a branch, tag or commit."
        )
    if "RepositoryNotFoundError" in causes:
        return (
            f"the hub has no repository {weights.location!r}, or it is private. Check the name; for a private one run "
            "`hf auth login`."
        )
    return (
        f"cannot fetch vision encoder {name!r}: it is no directory here, and the hub did not give it "
        f"({explain_reading(error)}). If this machine is offline, fetch it once where there is a network (hf download "
        f"{weights.location}) and copy the cache (HF_HOME), or give a local directory: hf:DIRECTORY."
    )


def _causes(error: BaseException | None) -> set[str]:
    """Return the names of an error's class and of those that led to it."""
    found: set[str] = set()
    while error is not None:
        found |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return found


# -- pixels ------------------------------------------------------------------------------------------------------------


def _load_pixels(name: str, weights: RepositoryWeights) -> Pixels:
    """Read how images are prepared.

    Raises:
        VisionEncoderError: if the file is not valid.
    """
    from vlm_cli.checkpoint.schemas.reading import check_is_mapping
    from vlm_cli.trust import load_image_processor

    try:
        for file in ("preprocessor_config.json", "processor_config.json"):
            check_is_mapping(weights.location, file, **_keywords(weights))
    except CheckpointError as error:
        raise VisionEncoderError(str(error)) from None
    try:
        processor = load_image_processor(weights.location, **_keywords(weights))
        data = processor.to_dict()
    except UntrustedCodeError as error:
        raise VisionEncoderError(str(error)) from None
    except (OSError, ValueError):  # there is none, or Transformers has no such class
        return read_pixels(None)
    try:
        return read_pixels(data, type(processor).__name__)
    except Exception as error:
        raise VisionEncoderError(
            f"preprocessor_config.json of {name!r} is not valid: {explain_reading(error)}."
        ) from None


def _fit_size(
    options: VisionEncoderOptions, config: PreTrainedConfig, pixels: Pixels
) -> tuple[PreTrainedConfig, tuple[int, int]]:
    """Return the configuration of a model that reads images of the size that is asked for, and the (H, W) pixels.

    Some models read every size. The position embeddings of others are resized when the weights are loaded.

    Raises:
        VisionEncoderError: if the model can do neither, or is no encoder of patches.
    """
    from vlm_cli.modeling.encoders.hf import find_structure

    timm_args = getattr(config, "model_args", None) or {}
    own = _pair(getattr(config, "image_size", None)) or _pair(timm_args.get("img_size"))
    size = _pair(options.image_size) or pixels.size or own or (224, 224)

    def attempt(candidate: PreTrainedConfig) -> Exception | None:
        try:
            find_structure({"config": candidate.to_dict(), "vision_cfg": {"image_size": [*size]}})
        except Exception as error:
            return error
        return None

    if (problem := attempt(config)) is None:
        return config, size
    if own is not None and size != own and hasattr(config, "image_size"):
        resized = type(config).from_dict({**config.to_dict(), "image_size": _like(config.image_size, size)})
        if attempt(resized) is None:
            return resized, size
    if isinstance(problem, VisionEncoderError):
        raise VisionEncoderError(f"vision encoder {options.name!r}: {problem}")
    raise VisionEncoderError(
        f"vision encoder {options.name!r}, of type {config.model_type!r}, does not make features of one image of "
        f"{size[0]} x {size[1]} pixels: {explain_reading(problem)}."
    )


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _like(old: Any, size: tuple[int, int]) -> Any:
    """Return a size in the form of another: one side, or both."""
    return size[0] if isinstance(old, int) and size[0] == size[1] else [*size]


# -- weights -----------------------------------------------------------------------------------------------------------


def check_hf_weights(tower: Tower) -> None:
    """Check that the weight files of a directory cover a tower and fit it, by names and shapes.

    Raises:
        VisionEncoderError: if they do not.
    """
    from vlm_cli.trust import match_weights

    assert isinstance(tower.weights, RepositoryWeights)
    if Path(tower.weights.location).is_dir():
        model = _meta_model(tower)
        tensors = _find_tensors(tower.weights, model)
        _check_complete(tower, match_weights(model, tensors.shapes(model.state_dict())))


def load_hf_tower(tower: Tower) -> nn.Module:
    """Make a tower with its weights, in float32.

    Raises:
        VisionEncoderError: if the weights cannot be fetched or do not fit.
    """
    from vlm_cli.checkpoint.size_limits import limited_size
    from vlm_cli.modeling.encoders.hf import check_tokens, truncate_hf_encoder, without_pooler
    from vlm_cli.trust import fill_vision_model

    assert isinstance(tower.weights, RepositoryWeights)
    model = _meta_model(tower)
    tensors = _find_tensors(tower.weights, model)
    try:
        with limited_size(f"the vision encoder of {tower.weights.location!r}", tensors.files):
            state = tensors.read(model.state_dict())
            loaded, info = fill_vision_model(type(model), model.config, state, **without_pooler(type(model)))
    except CheckpointError as error:
        raise VisionEncoderError(str(error)) from None
    _check_complete(tower, info)
    loaded.has_own_names = True
    loaded.vision_config = {key: x for key, x in tower.config.items() if key != "depth"}
    check_tokens(loaded, tower.weights.location)
    return truncate_hf_encoder(loaded, tower.config.get("depth"))


def _find_tensors(weights: RepositoryWeights, model: nn.Module) -> VisionTensors:
    """Find the tensors of a tower's model in files."""
    from vlm_cli.checkpoint.parts.hf_weights import VisionTensors

    plain = find_plain_type(_load_config(f"hf:{weights.location}", weights))
    return VisionTensors.find(weights, list(model.state_dict()), plain)


def _meta_model(tower: Tower) -> Any:
    """Build the whole model of a tower on the meta device."""
    from vlm_cli.modeling.meta import meta_device
    from vlm_cli.modeling.towers import build_tower

    whole = replace(tower, config={key: x for key, x in tower.config.items() if key != "depth"})
    with meta_device():
        return build_tower(whole.config)


#: Tensors that patches never pass, so that a file may lack them.
_UNUSED = re.compile(r"(^|\.)(mask_token|pooler\..*|head\..*|bool_masked_pos)$")


def _check_complete(tower: Tower, info: Mapping[str, Any]) -> None:
    """Check that the files held every tensor that the features of patches need, and no layer beyond.

    Raises:
        VisionEncoderError: if they did not.
    """
    from vlm_cli.modeling.encoders.hf import find_structure

    assert isinstance(tower.weights, RepositoryWeights)
    place = tower.weights.location
    if missing := sorted(x for x in info["missing_keys"] if not _UNUSED.search(x)):
        raise VisionEncoderError(
            f"the weights in {place!r} lack {count_of(len(missing), 'tensor')} of the vision encoder, e.g. "
            f"{missing[0]!r}."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, given, wanted = mismatched[0]
        raise VisionEncoderError(
            f"the weights in {place!r} give {count_of(len(mismatched), 'tensor')} of the vision encoder another shape, "
            f"e.g. {name!r}: {list(given)} in the file, {list(wanted)} wanted. Leave image_size out if you gave it: "
            "the positions of this model cannot be resized."
        )
    layers = find_structure({**tower.config, "depth": None}).layers
    if more := sorted(x for x in info["unexpected_keys"] if layers is not None and x.startswith(f"{layers}.")):
        raise VisionEncoderError(
            f"the weights in {place!r} hold {count_of(len(more), 'tensor')} of layers that the configuration does not "
            f"have, e.g. {more[0]!r}. Do they belong together?"
        )
