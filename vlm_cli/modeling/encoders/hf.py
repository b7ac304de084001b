"""Vision models of Transformers as vision encoders.

N images, C H W pixels, T tokens, v patches, d channels.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.encoders.structure import Stop, Structure, first_tensor, read_structure, stop_at
from vlm_cli.modeling.encoders.views import ReadsViews
from vlm_cli.modeling.meta import meta_device
from vlm_cli.plain_data import parse_json
from vlm_cli.trust import find_vision_class, make_config, name_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["build_hf_encoder", "check_tokens", "encoder_class", "find_structure", "read_size", "truncate_hf_encoder"]
__all__ += ["without_pooler"]


class _ReadsPatches:
    """What vlm adds to a vision model of Transformers: the features of patches by layer.

    The class of an encoder has the model's class as its other base, so that tensors keep their published names.
    """

    vision_config: Mapping[str, Any]
    pixels_name: str  # of the argument in which the model takes images
    has_feature_settings = True  # patch_features takes class_token and norm
    #: Whether files have the names that its modules have. Published files may have those of earlier releases, and
    #: Transformers renames them while it loads a model that is alone.
    has_own_names = False

    def is_custom_code(self) -> bool:
        """Tell Transformers whether it may rename tensors in files."""
        return self.has_own_names

    @property
    def pixel_size(self) -> tuple[int, int]:
        """The (H, W) pixels that the encoder reads; some models have an `image_size` of their own."""
        return read_size(self.vision_config)

    @cached_property
    def structure(self) -> Structure:
        """What the model's tokens are."""
        return find_structure(self.vision_config)

    @property
    def grid(self) -> tuple[int, int]:
        """The (rows, columns) of the patches of the last layer."""
        return self.structure.grid

    def patch_features(
        self, pixels: Tensor, layer: int = -1, *, class_token: bool = False, norm: bool | None = None
    ) -> Tensor:
        """float[N, C, H, W] -> float[N, v, d]; see `vlm_cli.modeling.towers.patch_features`."""
        found = self.structure
        model: Any = self
        if class_token and not found.has_class_token:
            raise VisionEncoderError("the vision encoder has no class token; leave out class_token.")
        if norm is not None and found.norm is None:
            raise VisionEncoderError("the vision encoder has no last norm of its patches; leave out norm.")
        applies = found.norm is not None and (layer == -1 if norm is None else norm)
        if layer == -1 and applies == found.is_normed:
            features = _run(model, pixels)
        else:
            features = self._layer_output(pixels, layer)
            features = model.get_submodule(found.norm)(features) if applies else features
        return _take_patches(features, found, class_token, len(pixels))

    def plain_layers(self, pixels: Tensor, layers: list[int], *, class_token: bool) -> dict[int, Tensor]:
        """Return float[N, v, d] of several layers, without the last norm; the model runs once."""
        if class_token and not self.structure.has_class_token:
            raise VisionEncoderError("the vision encoder has no class token; leave out class_token.")
        outputs: dict[int, Tensor] = {}
        if len(layers) > 1:
            with self._keeping(layers[:-1], outputs):
                outputs[layers[-1]] = self._layer_output(pixels, layers[-1])
        return {layer: _take_patches(x, self.structure, class_token, len(pixels)) for layer, x in outputs.items()}

    @contextmanager
    def _keeping(self, layers: list[int], outputs: dict[int, Tensor]) -> Iterator[None]:
        """Put what layers give into `outputs`, by layer."""

        def keep(layer: int) -> Callable[..., None]:
            return lambda _, args, output: outputs.__setitem__(layer, first_tensor(output))

        handles = [self._find_layer(layer).register_forward_hook(keep(layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _find_layer(self, layer: int) -> nn.Module:
        """Return a layer, counted from the end.

        Raises:
            VisionEncoderError: if the layers cannot be told apart, or there are too few.
        """
        found, model = self.structure, self
        assert isinstance(model, nn.Module)
        if found.layers is None:
            raise VisionEncoderError("the layers of the vision encoder cannot be told apart; leave out layer.")
        if -layer > found.depth:
            raise VisionEncoderError(
                f"the vision encoder has {found.depth} layers, so layer is at least {-found.depth}."
            )
        layers: Any = model.get_submodule(found.layers)
        chosen: nn.Module = layers[layer]
        return chosen

    def _layer_output(self, pixels: Tensor, layer: int) -> Tensor:
        """Return what a layer gives; the layers after it do not run, but for a tracer, which needs the end."""
        if torch.compiler.is_compiling():
            outputs: dict[int, Tensor] = {}
            with self._keeping([layer], outputs):
                _run(self, pixels)
            return outputs[layer]
        try:
            with stop_at(self._find_layer(layer)):
                _run(self, pixels)
        except Stop as stop:
            return stop.value
        raise AssertionError("the layer did not run")


def _run(model: Any, pixels: Tensor) -> Tensor:
    """Run a vision model, and return its last features."""
    output = model(**{model.pixels_name: pixels}, return_dict=True)
    found = getattr(output, "last_hidden_state", None)
    return first_tensor(output) if found is None else found


def _take_patches(features: Tensor, found: Structure, class_token: bool, count: int) -> Tensor:
    """Return float[N, v, d] of a map or of tokens; Pixtral puts the tokens of its N images into one row."""
    if features.ndim == 3 and len(features) == 1 and count > 1:
        features = features.reshape(count, -1, features.shape[-1])
    if features.ndim == 4:
        tokens = features if found.channels_last or not found.is_map else features.permute(0, 2, 3, 1)
        return tokens.flatten(1, 2)
    patches = features[:, found.before : features.shape[1] - found.after]
    return torch.cat([features[:, :1], patches], dim=1) if class_token else patches


def build_hf_encoder(vision_config: Mapping[str, Any]) -> nn.Module:
    """Build a vision model of Transformers with random weights.

    Args:
        vision_config: `config`, the configuration of the vision model in Transformers' words, with `model_type`, and
            `vision_cfg` with `image_size`.

    Raises:
        VisionEncoderError: if Transformers has no vision model of this type.
    """
    config, model = _find_model(vision_config["config"])
    encoder: Any = encoder_class(model)(config, **without_pooler(model))
    encoder.vision_config = vision_config
    encoder.has_own_names = True
    return truncate_hf_encoder(encoder, vision_config.get("depth"))


def without_pooler(model: Any) -> dict[str, bool]:
    """Return the argument that leaves out a model's pooler, which patches never pass; none if its class has none."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model.__init__).parameters else {}


def truncate_hf_encoder(encoder: Any, depth: int | None) -> nn.Module:
    """Keep the first `depth` layers of an encoder, in place; None keeps all.

    Raises:
        VisionEncoderError: if it has fewer layers, or they are not alike.
    """
    if depth is not None and isinstance(encoder, ReadsViews):
        raise VisionEncoderError("the vision encoder puts the channels of several layers together; leave out depth.")
    found = find_structure({**encoder.vision_config, "depth": None}) if depth is not None else None
    if found is None or depth is None:
        model: nn.Module = encoder
        return model
    if found.layers is None or found.is_map:
        raise VisionEncoderError("the vision encoder is no single stack of layers that could be cut; leave out depth.")
    if depth > found.depth:
        raise VisionEncoderError(f"the vision encoder has {found.depth} layers, so depth can be at most {found.depth}.")
    owner, _, name = found.layers.rpartition(".")
    setattr(encoder.get_submodule(owner), name, encoder.get_submodule(found.layers)[:depth])
    encoder.vision_config = {**encoder.vision_config, "depth": depth}
    encoder.__dict__.pop("structure", None)
    return encoder


def _find_model(settings: Mapping[str, Any]) -> tuple[PreTrainedConfig, Any]:
    """Return the configuration and the class of a vision model.

    Raises:
        VisionEncoderError: if Transformers has no vision model of this type.
    """
    own = dict(settings)
    config = make_config(own.pop("model_type"), **own)
    if (model := find_vision_class(config)) is None:
        raise VisionEncoderError(f"Transformers has no vision model of type {settings['model_type']!r}.")
    return config, model


@cache
def encoder_class(model: Any) -> type[Any]:
    """Return the class of encoders whose model has a class of Transformers."""
    added = ReadsViews if model.config_class.model_type in _READ_VIEWS else _ReadsPatches
    return type(model.__name__, (added, model), {"__module__": __name__, "pixels_name": name_pixels(model)})


#: Types of vision models that read all views of a picture together.
_READ_VIEWS = ("mllama_vision_model",)


def read_size(vision_config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (H, W) pixels that a configuration states."""
    size = vision_config["vision_cfg"]["image_size"]
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def find_structure(vision_config: Mapping[str, Any]) -> Structure:
    """Find out what the tokens of a vision model of Transformers are.

    Raises:
        VisionEncoderError: if they cannot be told apart.
    """
    key = [vision_config["config"], read_size(vision_config), vision_config.get("depth")]
    return _find_structure(json.dumps(key, sort_keys=True))


@cache
def _find_structure(key: str) -> Structure:
    settings, size, depth = parse_json(key)
    kind = settings["model_type"]
    with meta_device(), torch.no_grad():
        whole = {"config": settings, "vision_cfg": {"image_size": size}, "depth": depth}
        model: Any = build_hf_encoder(whole).eval()
        config = model.config
        pixels = torch.empty(1, getattr(config, "num_channels", 3), *size)
        try:
            return read_structure(model, lambda: _run(model, pixels), tuple(size))
        except VisionEncoderError as error:
            raise VisionEncoderError(f"a vision model of type {kind!r} cannot be a vision encoder: {error}.") from None


@torch.no_grad()
def check_tokens(encoder: Any, name: str) -> None:
    """Check on an encoder with its weights which of its tokens are patches, and that patches stand in rows.

    Tokens beside the patches do not depend on the image when the first layer reads them. When the last patch of the
    first row changes, the token of that patch changes most.

    Args:
        encoder: a vision model with weights.
        name: how a message names it.

    Raises:
        VisionEncoderError: if the tokens are not what `Structure` says.
    """
    found: Structure = encoder.structure
    if found.layers is None or found.is_map or not found.is_single_stack:
        return
    (height, width), (rows, columns) = encoder.pixel_size, found.grid
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height, width, generator=generator)
    changed = images[:1].clone()
    changed[:, :, : height // rows, width - width // columns :] += 1
    first = encoder.get_submodule(found.layers)[0]
    tokens = []
    for pixels in (images[:1], images[1:], changed):
        try:
            with stop_at(first, before=True):
                _run(encoder.eval(), pixels)
        except Stop as stop:
            tokens.append(stop.value[0].flatten(0, -2))
    differs = (tokens[0] != tokens[1]).flatten(1).any(1)
    expected = torch.ones_like(differs)
    expected[: found.before] = False
    expected[len(expected) - found.after :] = False
    moved = (tokens[2] - tokens[0]).flatten(1).abs().sum(1)
    if not torch.equal(differs, expected) or int(moved.argmax()) != found.before + columns - 1:
        raise VisionEncoderError(
            f"the tokens of the vision encoder {name!r} are not {found.before} tokens, then {rows} x {columns} patches "
            f"in rows, then {found.after} tokens, so vlm cannot tell its patches apart."
        )
