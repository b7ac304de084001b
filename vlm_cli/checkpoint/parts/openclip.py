"""Vision encoders by name: their configuration without a download, their weights when asked for.

Names are OpenCLIP's, and those that other packages register.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import PluginError, UnknownNameError, VisionEncoderError, VLMError, first_line
from vlm_cli.registry import VISION_ENCODERS, suggest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Tower", "complete_preprocessing", "fetch_weights", "find_tower", "list_towers", "load_tower", "weights_in"]


def list_towers() -> dict[str, str]:
    """Names of OpenCLIP and of other packages, and a word on each; found without importing OpenCLIP."""
    return {**dict.fromkeys(_openclip_files(), "OpenCLIP"), **VISION_ENCODERS.summaries()}


@cache
def _openclip_files() -> dict[str, Path]:
    """Names of OpenCLIP's own configurations and their files."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "model_configs").glob("*.json"))
    return {file.stem: file for file in files if "vision_cfg" in json.loads(file.read_text(encoding="utf-8"))}


@dataclass(frozen=True)
class Tower:
    """A tower that was found: its configuration, and where its weights are.

    Attributes:
        config: `embed_dim`, `vision_cfg`, `quick_gelu` and `preprocess`, and `depth` if it is cut; or `type`, a
            registered name, `vision_cfg`, `preprocess`, and whatever else that encoder's `configure` gave.
        model_config: OpenCLIP's whole configuration, text tower included; empty for a registered encoder.
        weights: file, OpenCLIP's record of a pretrained tag, or what a registered encoder's `load_pretrained` takes;
            None for random weights.
    """

    config: dict[str, Any]
    model_config: dict[str, Any] = field(repr=False)
    weights: Path | str | dict[str, Any] | None = None


def find_tower(options: VisionEncoderOptions) -> Tower:
    """Find a tower and its preprocessing; only `hf-hub:` names read a file from the hub, of a few kB.

    Raises:
        UnknownNameError: for a name or tag that neither OpenCLIP nor another package has.
        VisionEncoderError: for a configuration that cannot be read.
        PluginError: if the package that has the name is broken.
    """
    name = options.name
    if name in VISION_ENCODERS:
        return _find_registered(options)
    weights: Path | dict[str, Any] | None = None
    if name.startswith("hf-hub:"):
        data = _read_json(_hub_file(name.removeprefix("hf-hub:"), "open_clip_config.json"))
        weights = {"hf_hub": name.removeprefix("hf-hub:") + "/"}
    elif name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:")).expanduser()
        data = _read_json(folder / "open_clip_config.json")
        weights = weights_in(folder)
    elif name.endswith(".json"):
        data = _read_json(Path(name).expanduser())
    elif name in _openclip_files():
        data = _read_json(_openclip_files()[name])
    else:
        raise UnknownNameError(
            f"unknown vision encoder {name!r}.{suggest(name, _known())} Give a name of OpenCLIP, hf-hub:ORG/NAME, "
            "local-dir:FOLDER, or an OpenCLIP JSON file; or install the package that brings it. Run `vlm list "
            "vision-encoders` to see the names."
        )
    model = data.get("model_cfg", data)
    if not isinstance(model, dict) or "embed_dim" not in model or not isinstance(model.get("vision_cfg"), dict):
        raise VisionEncoderError(f"{name!r} is not an OpenCLIP configuration: it lacks embed_dim or vision_cfg.")
    tag: dict[str, Any] = {}
    if options.pretrained is not None and Path(options.pretrained).expanduser().is_file():
        weights = Path(options.pretrained).expanduser()
    elif options.pretrained is not None:
        weights = tag = _find_tag(name, options.pretrained)
    return Tower(_tower_config(model, {**data.get("preprocess_cfg", {}), **tag}, tag, options), model, weights)


def _known() -> list[str]:
    """All names, without importing other packages."""
    return [*_openclip_files(), *VISION_ENCODERS]


def _find_registered(options: VisionEncoderOptions) -> Tower:
    """An encoder of another package."""
    name = options.name
    if name in _openclip_files():
        raise PluginError(
            f"vision encoder {name!r} is a name of OpenCLIP, and an installed package registers it too. Uninstall that "
            "package."
        )
    if settings := options.openclip_settings:
        raise VisionEncoderError(
            f"vision encoder {name!r} is of another package, and {' and '.join(settings)} are settings of "
            "OpenCLIP's towers. Leave them out."
        )
    encoder = VISION_ENCODERS[name].load()
    if options.pretrained is not None and not hasattr(encoder, "load_pretrained"):
        raise UnknownNameError(
            f"vision encoder {name!r} has no pretrained weights, so pretrained={options.pretrained!r} means nothing to "
            "it. Leave it out; `vlm build OUT … --weights FILE` loads trained weights of a whole model."
        )
    try:
        # As it will be read from config.json, where a tuple is a list.
        config = json.loads(json.dumps(encoder.configure(options)))
        given, size = config.get("preprocess", {}), config["vision_cfg"]["image_size"]
        preprocess = complete_preprocessing({**given, "size": size})
        if unknown := sorted(given.keys() - preprocess.keys()):  # OpenCLIP would pass over them
            raise ValueError(f"preprocess has {unknown[0]!r}, and may have {', '.join(preprocess)}")
    except VLMError:
        raise
    except Exception as error:
        raise PluginError(
            f"{encoder.__name__}.configure gives no configuration of the vision encoder {name!r}: "
            f"{type(error).__name__}: {first_line(error)}. It must return plain data with vision_cfg.image_size."
        ) from error
    weights = None if options.pretrained is None else str(Path(options.pretrained).expanduser())
    return Tower({**config, "type": name, "preprocess": preprocess}, {}, weights)


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


def load_tower(tower: Tower) -> nn.Module:
    """The image tower with its weights, in float32; with random ones if it names none.

    Raises:
        VisionEncoderError: if the weights cannot be fetched or do not fit.
    """
    from vlm_cli.modeling.towers import build_tower, truncate_layers

    if tower.weights is None:
        return build_tower(tower.config)
    if "type" in tower.config:
        return _load_registered(tower)
    # Weights are published of all layers.
    whole = replace(tower, config={key: x for key, x in tower.config.items() if key != "depth"})
    return truncate_layers(_load_whole(whole), tower.config.get("depth"))


def _load_whole(tower: Tower) -> nn.Module:
    """One of OpenCLIP's towers with all of its layers and their weights."""
    from vlm_cli.modeling.towers import build_tower, set_image_size

    assert isinstance(tower.weights, (Path, dict))
    path = tower.weights if isinstance(tower.weights, Path) else _download(tower.weights)
    try:
        state = _visual_state(path)
        if not state:
            return _load_with_openclip(tower, path)
    except VisionEncoderError:
        raise
    except Exception as error:
        raise VisionEncoderError(f"cannot load the weights {str(path)!r}: {first_line(error)}.") from None
    vision_cfg = tower.config["vision_cfg"]
    if "timm_model_name" not in vision_cfg:
        visual = build_tower(tower.config)
        _fill(visual, state, path)
        return visual
    # timm resizes a tower that is loaded, not a file.
    visual = build_tower({**tower.config, "vision_cfg": tower.model_config["vision_cfg"]})
    _fill(visual, state, path)
    size = vision_cfg.get("image_size", visual.image_size)
    visual.image_size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return set_image_size(visual)


def _load_registered(tower: Tower) -> nn.Module:
    """An encoder of another package, which loads its weights itself."""
    from vlm_cli.modeling.towers import build_tower

    visual: Any = build_tower(tower.config)
    try:
        visual.load_pretrained(tower.weights)
    except VLMError:
        raise
    except Exception as error:
        raise VisionEncoderError(
            f"vision encoder {tower.config['type']!r} cannot load the weights {tower.weights!r}: "
            f"{type(error).__name__}: {first_line(error)}."
        ) from None
    return visual.float()


def _visual_state(path: Path) -> dict[str, Any]:
    """Tensors of the image tower under OpenCLIP's names; empty for a file in another layout."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys() if k.startswith("visual.")}
    if path.suffix in (".npz", ".npy"):
        return {}
    from open_clip.factory import load_state_dict

    return {k: x for k, x in load_state_dict(str(path)).items() if k.startswith("visual.")}


def _fill(visual: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load a tower, after resizing a ViT's position embeddings to its image size as OpenCLIP does.

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
        (wanted.keys() - state.keys(), "lack {} tensors of the vision tower"),
        (state.keys() - wanted.keys(), "hold {} tensors that the vision tower does not have"),
        (shapes, "give {} tensors of the vision tower another shape"),
    ):
        if names:
            raise VisionEncoderError(f"the weights {str(path)!r} {what.format(len(names))}, e.g. {min(names)!r}.")
    visual.load_state_dict(state)


def _load_with_openclip(tower: Tower, path: Path) -> nn.Module:
    """OpenCLIP's own loader, for files of other projects; it builds the text tower too."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    from vlm_cli.modeling.towers import set_image_size

    model_config = {k: v for k, v in tower.model_config.items() if k not in ("custom_text", "multimodal_cfg")}
    model_config |= {key: tower.config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu")}
    # A configuration without a text tower gets a small one, which is thrown away.
    model_config["text_cfg"] = {**model_config.get("text_cfg", _SMALL_TEXT), "hf_model_pretrained": False}
    custom = tower.model_config.get("custom_text") or "hf_model_name" in model_config["text_cfg"]
    model = (CustomTextCLIP if custom else CLIP)(**model_config)
    missing = load_checkpoint(model, str(path), strict=False)
    absent = [k for k in getattr(missing, "missing_keys", []) if k.startswith("visual.")]
    if absent:
        raise VisionEncoderError(
            f"the weights {str(path)!r} lack {len(absent)} tensors of the vision tower, e.g. {absent[0]!r}."
        )
    # Interpolates position embeddings that were loaded at the tower's own size.
    return set_image_size(model.visual).float()


_SMALL_TEXT = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VisionEncoderError(f"cannot read the OpenCLIP configuration {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise VisionEncoderError(f"the OpenCLIP configuration {str(path)!r} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise VisionEncoderError(f"the OpenCLIP configuration {str(path)!r} does not hold a mapping.")
    return data


def weights_in(folder: Path) -> Path | None:
    """The weights in a folder as OpenCLIP's hub repositories are."""
    from open_clip.factory import _find_checkpoint_in_dir

    found = _find_checkpoint_in_dir(folder)
    return None if found is None else Path(found)


def _hub_file(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:
        raise VisionEncoderError(_cannot_fetch(f"{name} of {repository!r}", error)) from None


def fetch_weights(tower: Tower) -> Path:
    """The file of one of OpenCLIP's towers that has weights; from the cache, or else fetched.

    Raises:
        VisionEncoderError: if it cannot be.
    """
    assert tower.weights is not None and not isinstance(tower.weights, str)
    return tower.weights if isinstance(tower.weights, Path) else _download(tower.weights)


def _download(record: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

    source = record.get("hf_hub") or record.get("url") or "?"
    try:
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
