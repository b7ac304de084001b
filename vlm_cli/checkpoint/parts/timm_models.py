"""Models of timm by name: `timm:NAME` or `timm:NAME.TAG`, with the weights that timm publishes under the tag."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.parts.tower import RepositoryWeights, Tower, TowerWeights, WeightsFile
from vlm_cli.checkpoint.torch_files import describe_load_error, read_shapes, read_torch_file
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import CheckpointError, UnknownNameError, VisionEncoderError, explain_reading
from vlm_cli.offline import use_cache_without_network
from vlm_cli.printable import count_of
from vlm_cli.registry import suggest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_timm_weights", "find_timm_tower", "load_timm_tower"]


def find_timm_tower(options: VisionEncoderOptions) -> Tower:
    """Find a model of timm, and how its images are prepared. Nothing is fetched.

    Raises:
        UnknownNameError: for a name or tag that timm does not have.
        VisionEncoderError: for a file of weights that does not exist.
    """
    name, _, tag = options.name.removeprefix("timm:").partition(".")
    published = _find_published(options.name, name, tag)
    own = tuple(published.get("input_size") or (3, 224, 224))[1:]
    size = own if options.image_size is None else (options.image_size, options.image_size)
    notes: tuple[str, ...] = ()
    weights: TowerWeights | None = None
    if options.pretrained is not None:
        file = Path(os.path.expanduser(options.pretrained))
        if not file.is_file():
            raise VisionEncoderError(
                f"there is no file {options.pretrained!r}. timm's own weights stand after the name: "
                f"timm:{name}.TAG; `vlm list vision-encoders timm:{name}` shows the tags."
            )
        weights = WeightsFile(file)
    elif published.get("hf_hub_id"):
        weights = RepositoryWeights(published["hf_hub_id"].rstrip("/"))
    else:
        notes = (f"timm publishes no weights of {options.name!r} on the hub, so the vision encoder is random.",)
    config: dict[str, Any] = {
        "type": "timm",
        "name": name,
        "vision_cfg": {"image_size": size[0] if size[0] == size[1] else [*size]},
        "preprocess": _read_pixels(published, size),
    }
    depth = {} if options.depth is None else {"depth": options.depth}
    return Tower({**config, **depth}, {}, weights, notes)


def _find_published(whole: str, name: str, tag: str) -> dict[str, Any]:
    """Return timm's record of a model's weights and of how its images are prepared.

    Raises:
        UnknownNameError: if timm has no such model or tag.
    """
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name):
        guess = suggest(name, timm.list_models())
        raise UnknownNameError(
            f"unknown vision encoder {whole!r}: timm {timm.__version__} has no model {name!r}.{guess} Run `vlm list "
            "vision-encoders timm` to see the names."
        )
    tags = [x.partition(".")[2] for x in timm.list_pretrained(f"{name}.*") if x.partition(".")[0] == name]
    if tag and tag not in tags:
        known = f"Known tags: {', '.join(tags)}." if tags else "It has no published weights."
        raise UnknownNameError(
            f"unknown vision encoder {whole!r}: timm has no tag {tag!r}.{suggest(tag, tags)} {known}"
        )
    found = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    return {} if found is None else found.to_dict()


def _read_pixels(published: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    """Return how timm prepares images for an evaluation, in OpenCLIP's words."""
    from vlm_cli.checkpoint.parts.openclip import complete_preprocessing

    share = published.get("crop_pct") or 0.875
    before = [math.floor(side / share) for side in size]
    is_squashed = published.get("crop_mode") == "squash"
    given: dict[str, Any] = {
        "size": size[0] if size[0] == size[1] else [*size],
        "mean": tuple(published.get("mean") or (0.485, 0.456, 0.406)),
        "std": tuple(published.get("std") or (0.229, 0.224, 0.225)),
        "interpolation": published.get("interpolation") or "bicubic",
        "resize_mode": "squash" if is_squashed or size[0] != size[1] else "shortest",
    }
    whole = complete_preprocessing(given)
    if before == [*size]:
        return whole
    return whole | ({"squashed": before} if given["resize_mode"] == "squash" else {"shortest_edge": before[0]})


# -- weights -----------------------------------------------------------------------------------------------------------


def check_timm_weights(tower: Tower) -> None:
    """Check that a file of weights on this machine covers a tower and fits it, by names and shapes.

    Raises:
        VisionEncoderError: if it does not.
    """
    from vlm_cli.modeling.meta import meta_device

    if isinstance(tower.weights, WeightsFile):
        with meta_device():
            model = _build_published(tower)
        _check(tower.weights.path, _read(tower.weights.path, only_shapes=True), model, tower)


def load_timm_tower(tower: Tower) -> nn.Module:
    """Make a tower with its weights, in float32.

    Raises:
        VisionEncoderError: if the weights cannot be fetched or do not fit.
    """
    from vlm_cli.checkpoint.size_limits import limited_size
    from vlm_cli.modeling.towers import set_image_size, truncate_layers

    path = _fetch(tower)
    try:
        with limited_size(f"the vision encoder with weights {str(path)!r}", [path]):
            model = _build_published(tower)
    except CheckpointError as error:
        raise VisionEncoderError(str(error)) from None
    model.trunk.load_state_dict(_check(path, _read(path), model, tower))
    size = tower.config["vision_cfg"]["image_size"]
    model.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
    # timm resizes the position embeddings that were loaded at the model's own size.
    return truncate_layers(set_image_size(model), tower.config.get("depth")).float()


def _build_published(tower: Tower) -> Any:
    """Build the model of a tower at the size and depth that its published weights have."""
    from vlm_cli.modeling.encoders.timm import build_timm_encoder

    return build_timm_encoder(tower.config)


def _fetch(tower: Tower) -> Path:
    """Return the file of a tower's weights; download it if it is not in the cache.

    Raises:
        VisionEncoderError: if it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    if isinstance(tower.weights, WeightsFile):
        return tower.weights.path
    assert isinstance(tower.weights, RepositoryWeights)
    use_cache_without_network()
    problem: Exception | None = None
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            return Path(hf_hub_download(tower.weights.location, name, revision=tower.weights.revision))
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise VisionEncoderError(
        f"cannot fetch the weights {tower.weights.location!r} of timm: {explain_reading(problem)}. If this machine is "
        "offline, fetch them once where there is a network and copy the cache (HF_HOME), or name a local file: --set "
        "vision_encoder.pretrained=FILE; --random-weights needs no weights."
    )


def _read(path: Path, *, only_shapes: bool = False) -> dict[str, Any]:
    """Read the tensors of a file, without the prefixes that OpenCLIP and data-parallel training put before names."""
    try:
        if only_shapes:
            state: Any = read_shapes(path)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = read_torch_file(path)
    except Exception as error:
        raise VisionEncoderError(f"cannot load the weights {str(path)!r}: {describe_load_error(error)}.") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return {str(k).removeprefix("module.").removeprefix("visual.trunk."): x for k, x in state.items()}


def _check(path: Path, state: dict[str, Any], model: Any, tower: Tower) -> dict[str, Any]:
    """Return the tensors of a model's trunk, without those of the classifier.

    Raises:
        VisionEncoderError: if the file holds another model.
    """
    wanted = model.trunk.state_dict()
    classifiers = model.trunk.default_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{x}." for x in (*classifiers, "head", "fc", "classifier"))
    held = {k: x for k, x in state.items() if k in wanted or not k.startswith(heads)}
    shapes = [k for k, x in held.items() if k in wanted and x.shape != wanted[k].shape]
    for names, what in (
        (wanted.keys() - held.keys(), "lack {} of"),
        (held.keys() - wanted.keys(), "hold {} that does not belong to"),
        (shapes, "give another shape to {} of"),
    ):
        if names:
            raise VisionEncoderError(
                f"the weights {str(path)!r} {what.format(count_of(len(names), 'tensor'))} timm's model "
                f"{tower.config['name']!r}, e.g. {min(names)!r}."
            )
    return held
