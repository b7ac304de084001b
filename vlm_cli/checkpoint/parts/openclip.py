"""OpenCLIP's vision encoders: their configurations without a download, their weights when asked for."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.inside import check_folder
from vlm_cli.checkpoint.parts.tower import PublishedWeights, Tower, TowerWeights, WeightsFile
from vlm_cli.checkpoint.schemas.vision import check_openclip_config
from vlm_cli.checkpoint.surplus import is_computed
from vlm_cli.checkpoint.torch_files import describe_load_error, read_shapes, read_torch_file
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import CheckpointError, UnknownNameError, VisionEncoderError
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.lookalike import find_named
from vlm_cli.offline import is_cache_alone, use_cache_without_network
from vlm_cli.plain_data import read_json
from vlm_cli.printable import count_of
from vlm_cli.registry import VISION_ENCODERS, suggest

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "check_openclip_weights",
    "complete_preprocessing",
    "fetch_weights",
    "find_openclip_tower",
    "load_openclip_tower",
    "openclip_files",
    "published_address",
    "weights_in",
]


@cache
def openclip_files() -> dict[str, Path]:
    """Return the names of OpenCLIP's own configurations and their files, without importing OpenCLIP."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "model_configs").glob("*.json"))
    return {file.stem: file for file in files if "vision_cfg" in read_json(file)}


def find_openclip_tower(options: VisionEncoderOptions) -> Tower:
    """Find a tower by OpenCLIP's name, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, or the path of a JSON file.

    Raises:
        UnknownNameError: for a name or tag that OpenCLIP does not have.
        VisionEncoderError: for a configuration that cannot be read.
    """
    name = options.name
    weights: TowerWeights | None = None
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        if not is_hub_id(repository):
            raise VisionEncoderError(
                f"{repository!r} is no id of a hub repository. Give hf-hub:ORG/NAME, or local-dir:FOLDER."
            )
        data = _read_json(_hub_file(repository, "open_clip_config.json"))
        weights = PublishedWeights({"hf_hub": repository + "/"})
    elif name.startswith("local-dir:"):
        folder = find_named(name.removeprefix("local-dir:"))
        if not folder.is_dir():
            raise VisionEncoderError(
                f"there is no directory {str(folder)!r}. Give local-dir:FOLDER with a folder that holds "
                "open_clip_config.json."
            )
        check_folder(folder)
        data = _read_json(folder / "open_clip_config.json")
        path = weights_in(folder)
        weights = None if path is None else WeightsFile(path)
    elif name.endswith(".json"):
        data = _read_json(find_named(name))
    elif name in openclip_files():
        data = _read_json(openclip_files()[name])
    else:
        guess = suggest(name, [*openclip_files(), *VISION_ENCODERS])
        if not guess and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            guess = f" If it is a repository on the hub, write 'hf:{name}', or 'hf-hub:{name}' for one of OpenCLIP."
        raise UnknownNameError(
            f"unknown vision encoder {name!r}.{guess} Give a name of OpenCLIP, hf:ORG/NAME, hf-hub:ORG/NAME, "
            "local-dir:FOLDER, or an OpenCLIP JSON file; or install the package that brings it. Run `vlm list "
            "vision-encoders` to see the names."
        )
    model = data.get("model_cfg", data)
    if not isinstance(model, dict) or "embed_dim" not in model or not isinstance(model.get("vision_cfg"), dict):
        raise VisionEncoderError(f"{name!r} is not an OpenCLIP configuration: it lacks embed_dim or vision_cfg.")
    check_openclip_config(data, name)
    tag: dict[str, Any] = {}
    if options.pretrained is not None and (file := find_named(options.pretrained)).is_file():
        weights = WeightsFile(file)
    elif options.pretrained is not None:
        tag = _find_tag(name, options.pretrained)
        weights = PublishedWeights(tag)
    return Tower(_tower_config(model, {**data.get("preprocess_cfg", {}), **tag}, tag, options), model, weights)


def complete_preprocessing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenCLIP's whole description of how images are prepared, with its defaults for what `given` leaves out."""
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    return merge_preprocess_dict(asdict(PreprocessCfg()), dict(given))


def _tower_config(
    model: Mapping[str, Any], preprocess: Mapping[str, Any], tag: Mapping[str, Any], options: VisionEncoderOptions
) -> dict[str, Any]:
    vision = dict(model["vision_cfg"])
    if options.image_size is not None:
        vision["image_size"] = options.image_size
    size = {"size": vision.get("image_size", 224)}
    config = {
        "embed_dim": model["embed_dim"],
        "vision_cfg": vision,
        # The weights know which activation they were trained with; OpenCLIP only warns when the name disagrees.
        "quick_gelu": tag.get("quick_gelu", False) if tag else model.get("quick_gelu", False),
        "preprocess": complete_preprocessing({**preprocess, **size}),
    }
    return config if options.depth is None else {**config, "depth": options.depth}


def _find_tag(name: str, tag: str) -> dict[str, Any]:
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    found = get_pretrained_cfg(name, tag)
    if not found:
        tags = list_pretrained_tags_by_model(name)
        known = f"Known tags: {', '.join(tags)}" if tags else "OpenCLIP has no weights for it"
        raise UnknownNameError(
            f"vision encoder {name!r} has no pretrained weights {tag!r}, and no such file exists.{suggest(tag, tags)} "
            f"{known}."
        )
    return dict(found)


def published_address(name: str, tag: str | None) -> str | None:
    """Return the address that OpenCLIP's own table has for a tag; None if it has none."""
    from open_clip.pretrained import get_pretrained_cfg

    return None if tag is None else get_pretrained_cfg(name, tag).get("url")


def load_openclip_tower(tower: Tower) -> nn.Module:
    """Make a tower with its weights, in float32.

    Raises:
        VisionEncoderError: if the weights cannot be fetched or do not fit.
    """
    from vlm_cli.modeling.towers import truncate_layers

    # Files hold the weights of all layers, so that layers are dropped after loading.
    whole = replace(tower, config={key: x for key, x in tower.config.items() if key != "depth"})
    path = fetch_weights(tower)
    try:
        from vlm_cli.checkpoint.size_limits import limited_size  # imports torch, and `vlm list` must answer at once

        with limited_size(f"the vision encoder with weights {str(path)!r}", [path]):
            loaded = _load_whole(whole, path)
    except CheckpointError as error:
        raise VisionEncoderError(str(error)) from None
    return truncate_layers(loaded, tower.config.get("depth"))


def check_openclip_weights(tower: Tower) -> None:
    """Check that a weight file on this machine covers a tower and fits it, by names and shapes.

    A file with other names than OpenCLIP's is checked when it is loaded.

    Raises:
        VisionEncoderError: if it cannot be read or does not fit.
    """
    from vlm_cli.modeling.meta import meta_device

    if isinstance(tower.weights, WeightsFile):
        whole = replace(tower, config={key: x for key, x in tower.config.items() if key != "depth"})
        with meta_device():
            _fill_whole(whole, tower.weights.path, only_shapes=True)


def _load_whole(tower: Tower, path: Path) -> nn.Module:
    """Make a tower with all of its layers and their weights."""
    try:
        return _fill_whole(tower, path) or _load_with_openclip(tower, path)
    except (CheckpointError, VisionEncoderError):
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def _fill_whole(tower: Tower, path: Path, *, only_shapes: bool = False) -> nn.Module | None:
    """Make a tower of a file with OpenCLIP's names, with all of its layers; None if the file has other names."""
    from vlm_cli.modeling.towers import build_tower, set_image_size

    try:
        state = _visual_state(path, only_shapes)
    except Exception as error:
        raise _unreadable(path, error) from None
    if not state:
        return None
    vision_cfg = tower.config["vision_cfg"]
    if "timm_model_name" not in vision_cfg:
        visual: Any = build_tower(tower.config)
        _fill(visual, state, path)
        return visual
    # timm resizes a tower that is loaded, not a file.
    visual = build_tower({**tower.config, "vision_cfg": tower.model_config["vision_cfg"]})
    _fill(visual, state, path)
    if only_shapes:
        return visual
    size = vision_cfg.get("image_size", visual.image_size)
    visual.image_size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return set_image_size(visual)


def _unreadable(path: Path, error: Exception) -> VisionEncoderError:
    return VisionEncoderError(f"cannot load the weights {str(path)!r}: {describe_load_error(error)}.")


def _visual_state(path: Path, only_shapes: bool) -> dict[str, Any]:
    """Read the tensors of the image tower under OpenCLIP's names; none if the file names them differently."""
    if path.suffix in (".npz", ".npy"):
        return {}
    if path.suffix == ".safetensors" and not only_shapes:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys() if k.startswith("visual.")}
    state = read_shapes(path) if only_shapes else read_torch_file(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    # Data-parallel training puts "module." before each name.
    state = {str(k).removeprefix("module."): x for k, x in state.items()} if path.suffix != ".safetensors" else state
    return {k: x for k, x in state.items() if k.startswith("visual.")}


def _fill(visual: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Copy tensors into a tower. Resize the position embeddings of a ViT to its image size first, as OpenCLIP does.

    Raises:
        VisionEncoderError: if the file holds another tower.
    """
    from types import SimpleNamespace

    from open_clip.model import resize_pos_embed

    resize_pos_embed(state, SimpleNamespace(visual=visual))
    state = {k.removeprefix("visual."): x for k, x in state.items()}
    wanted = visual.state_dict()
    shapes = [k for k, x in state.items() if k in wanted and x.shape != wanted[k].shape]
    for names, what in (
        (wanted.keys() - state.keys(), "lack {} of the vision tower"),
        (state.keys() - wanted.keys(), "hold {} that the vision tower does not have"),
        (shapes, "give {} of the vision tower another shape"),
    ):
        if names:
            raise VisionEncoderError(
                f"the weights {str(path)!r} {what.format(count_of(len(names), 'tensor'))}, e.g. {min(names)!r}."
            )
    visual.load_state_dict(state)


def _load_with_openclip(tower: Tower, path: Path) -> nn.Module:
    """Load a file of another project with OpenCLIP's own loader, which builds the text tower too."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    from vlm_cli.modeling.towers import set_image_size

    model_config = {k: v for k, v in tower.model_config.items() if k not in ("custom_text", "multimodal_cfg")}
    model_config |= {key: tower.config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu")}
    # Only the image tower is kept. A configuration without a text tower gets a small one, and so does one whose text
    # tower is a model of Transformers: its configuration and code would come from another repository.
    text = model_config.get("text_cfg", _SMALL_TEXT)
    of_transformers = bool(text.get("hf_model_name"))
    model_config["text_cfg"] = _SMALL_TEXT if of_transformers else text
    custom = tower.model_config.get("custom_text") or of_transformers
    model = (CustomTextCLIP if custom else CLIP)(**model_config)
    found = load_checkpoint(model, str(path), strict=False)
    surplus = [k for k in getattr(found, "unexpected_keys", []) if not is_computed(k)]
    for names, what in (
        (getattr(found, "missing_keys", []), "lack {} of the vision tower"),
        (surplus, "hold {} that the vision tower does not have"),
    ):
        if names := [k for k in names if k.startswith("visual.")]:
            found_names = what.format(count_of(len(names), "tensor"))
            raise VisionEncoderError(f"the weights {str(path)!r} {found_names}, e.g. {names[0]!r}.")
    if path.suffix == ".npz" and (held := _count_npz_blocks(path)) > (used := len(model.visual.trunk.blocks)):
        raise VisionEncoderError(
            f"the weights {str(path)!r} hold {held} blocks, and the configuration of the vision tower says {used}."
        )
    # Interpolates position embeddings that were loaded at the tower's own size.
    return set_image_size(model.visual).float()


def _count_npz_blocks(path: Path) -> int:
    """Count the blocks of the image tower in a file of big_vision, of which OpenCLIP reads as many as it has."""
    from numpy.lib.format import read_array_header_1_0, read_magic

    count = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"(params/)?img/Transformer/encoderblock(_\d+)?/LayerNorm_0/scale\.npy", name):
                with archive.open(name) as array:
                    read_magic(array)
                    shape, _, _ = read_array_header_1_0(array)  # all blocks in one array have a row each
                    count += shape[0] if len(shape) == 2 else 1
    return count


_SMALL_TEXT = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except OSError as error:
        raise VisionEncoderError(f"cannot read the OpenCLIP configuration {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise VisionEncoderError(f"the OpenCLIP configuration {str(path)!r} is not valid: {error}.") from None
    if not isinstance(data, dict):
        raise VisionEncoderError(f"the OpenCLIP configuration {str(path)!r} does not hold a mapping.")
    return data


def weights_in(folder: Path) -> Path | None:
    """Find the weight file in a folder that is laid out like OpenCLIP's hub repositories; None if it has none."""
    from open_clip.factory import _find_checkpoint_in_dir

    found = _find_checkpoint_in_dir(folder)
    return None if found is None else Path(found)


def _hub_file(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    use_cache_without_network()
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:
        raise VisionEncoderError(_cannot_fetch(f"{name} of {repository!r}", error)) from None


def fetch_weights(tower: Tower) -> Path:
    """Return the file of a tower's weights; download it if it is not in the cache.

    Raises:
        VisionEncoderError: if it cannot be fetched.
    """
    assert isinstance(tower.weights, (WeightsFile, PublishedWeights))
    return tower.weights.path if isinstance(tower.weights, WeightsFile) else _download(tower.weights.record)


def _download(record: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

    source = record.get("hf_hub") or record.get("url") or "?"
    try:
        if "hf_hub" in record:
            use_cache_without_network()
        elif is_cache_alone() and not (Path("~/.cache/clip").expanduser() / PurePosixPath(source).name).is_file():
            raise FileNotFoundError(source)  # OpenCLIP would download it
        if set(record) == {"hf_hub"}:
            return Path(download_pretrained_from_hf(record["hf_hub"].rstrip("/")))
        return Path(download_pretrained(record))
    except Exception as error:
        raise VisionEncoderError(_cannot_fetch(f"the weights {source!r}", error)) from None


def _cannot_fetch(what: str, error: Exception) -> str:
    return (
        f"cannot fetch {what}: {type(error).__name__}. If this machine is offline, fetch it once where there is a "
        "network and copy the cache (HF_HOME), or name a local file: local-dir:FOLDER, or the tower's name with "
        "--set vision_encoder.pretrained=FILE; --random-weights needs no weights."
    )
