"""A model's parts with the shapes along the data flow, its tokens, preprocessing and gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vlm_cli.modeling.language_model import context_length, find_widths
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.report.parameters import ParameterRow, count_parameters
from vlm_cli.tiling.texts import list_shapes

__all__ = [
    "LanguageModelDescription",
    "ModelDescription",
    "TokenDescription",
    "VisionEncoderDescription",
    "describe",
]

#: Dimensions of a tensor: numbers, and the letters of docs/architecture.md for those that a prompt decides.
Shape = list[int | str]


@dataclass(frozen=True, kw_only=True)
class VisionEncoderDescription:
    """The vision encoder.

    Attributes:
        name: of OpenCLIP, or of another package.
        pretrained: the tag of its weights.
        class_name: of the tower, and of the trunk inside it if it has one.
        layer: the layer whose output is the features; -1 is the last.
        settings: what the composition changes of OpenCLIP's own tower.
        preprocessing: image size, mean, standard deviation and so on.
    """

    name: str
    pretrained: str | None
    class_name: str
    layer: int | tuple[int, ...]
    settings: dict[str, Any]
    preprocessing: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pretrained": self.pretrained,
            "class": self.class_name,
            "layer": [*self.layer] if isinstance(self.layer, tuple) else self.layer,
            **self.settings,
            "preprocessing": self.preprocessing,
        }


@dataclass(frozen=True, kw_only=True)
class LanguageModelDescription:
    """The language model.

    Attributes:
        name: directory or hub id.
        type: of Transformers, such as "llama".
        layers: number of decoder layers; None if its configuration does not say.
        embedding_channels, layer_channels: channels of the embedding table, and between the layers.
        context: most positions; None for no limit.
    """

    name: str
    class_name: str
    type: str
    layers: int | None
    embedding_channels: int
    layer_channels: int
    context: int | None

    def to_dict(self) -> dict[str, Any]:
        return {("class" if name == "class_name" else name): x for name, x in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class TokenDescription:
    """Ids of special tokens.

    Attributes:
        added: token -> id, for the tokens that the composition adds.
        media: the placeholder of a medium.
        stop: the ids that end an answer; None if no id does.
        special: token -> id of the tokenizer; None without a tokenizer.
    """

    added: dict[str, int]
    media: int | None
    pad: int | None
    stop: list[int] | None
    special: dict[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        if self.special is None:
            del data["special"]
        return data


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Everything that `vlm inspect` shows.

    Attributes:
        family: the preset that the composition began with.
        parameters, bytes: of the whole model.
        vision_tokenizer, fusion: type and options, without rare ones that have their defaults.
        before_layers: decoder layers that have a block of the fusion before them.
        shapes: name -> dimensions, along the data flow.
        positions_per_image: positions of the language model that one image takes; the least, if it is cut.
        most_positions_per_image: the most that one image takes.
        weight_decay, weight_decay_on: the value, and the parts that it applies to.
        gates: gate -> tanh of it; 0 is closed.
        parts: number of parameters of each part.
    """

    family: str | None
    class_name: str
    dtype: str
    parameters: int
    bytes: int
    vision_encoder: VisionEncoderDescription
    vision_tokenizer: dict[str, Any]
    fusion: dict[str, Any]
    before_layers: list[int]
    language_model: LanguageModelDescription
    shapes: dict[str, Shape]
    positions_per_image: int
    most_positions_per_image: int
    tokens: TokenDescription
    trainable: list[str]
    weight_decay: float
    weight_decay_on: list[str]
    gates: dict[str, float]
    parts: list[ParameterRow]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `vlm inspect --json`."""
        return {
            "family": self.family,
            "class": self.class_name,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "vision_encoder": self.vision_encoder.to_dict(),
            "vision_tokenizer": self.vision_tokenizer,
            "fusion": {**self.fusion, **({"before_layers": self.before_layers} if self.before_layers else {})},
            "language_model": self.language_model.to_dict(),
            "shapes": self.shapes,
            "positions_per_image": self.positions_per_image,
            "most_positions_per_image": self.most_positions_per_image,
            "tokens": self.tokens.to_dict(),
            "trainable": self.trainable,
            "weight_decay": {"value": self.weight_decay, "on": self.weight_decay_on},
            "gates": self.gates,
            "parts": [asdict(row) for row in self.parts],
        }


def describe(
    model: VLM,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    gate_values: dict[str, float],
    dtype: torch.dtype | None = None,
) -> ModelDescription:
    """Describe a model.

    Args:
        model: on any device; shapes are enough.
        tokenizer: for the ids of special tokens; None leaves them out.
        gate_values: tanh of each gate, by name.
        dtype: dtype of the weights, if the model on the meta device has another one.
    """
    composition, report = model.config.composition, count_parameters(model, dtype=dtype)
    shapes = list_shapes(composition.tiling, model.vision_encoder.image_size[::-1])
    positions = [model.positions_of(size) for size in shapes]
    return ModelDescription(
        family=composition.family,
        class_name=type(model).__name__,
        dtype=report.dtype,
        parameters=report.total.parameters,
        bytes=report.total.bytes,
        vision_encoder=_describe_vision_encoder(model),
        vision_tokenizer=composition.vision_tokenizer.to_brief_dict(),
        fusion=composition.fusion.to_brief_dict(),
        before_layers=model.block_layers,
        language_model=_describe_language_model(model),
        shapes=_shapes(model),
        positions_per_image=min(positions),
        most_positions_per_image=max(positions),
        tokens=_describe_tokens(model, tokenizer),
        trainable=list(composition.trainable),
        weight_decay=composition.weight_decay,
        weight_decay_on=list(composition.weight_decay_on),
        gates=gate_values,
        parts=report.rows,
    )


def _describe_vision_encoder(model: VLM) -> VisionEncoderDescription:
    options, visual = model.config.composition.vision_encoder, model.vision_encoder.visual
    trunk = getattr(visual, "trunk", None)
    return VisionEncoderDescription(
        name=options.name,
        pretrained=options.pretrained,
        class_name=type(visual).__name__ + ("" if trunk is None else f"({type(trunk).__name__})"),
        layer=options.layer,
        settings=options.openclip_settings,
        preprocessing=model.config.vision_config["preprocess"],
    )


def _describe_language_model(model: VLM) -> LanguageModelDescription:
    text, width = model.config.get_text_config(decoder=True), find_widths(model.lang_model)
    return LanguageModelDescription(
        name=model.config.composition.language_model.name,
        class_name=type(model.lang_model).__name__,
        type=text.model_type,
        layers=getattr(text, "num_hidden_layers", None),
        embedding_channels=width.embedding,
        layer_channels=width.layer,
        context=context_length(model.config),
    )


def _shapes(model: VLM) -> dict[str, Shape]:
    config = model.config
    size = config.vision_config["preprocess"]["size"]
    channels = 3 * len(config.vision_config["preprocess"].get("encoders", "1"))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {
        "vision_x": ["B", "T_img", "F", channels, height, width],
        "features": ["B", "T_img", "F", config.vision_config["num_patches"], config.vision_config["dim"]],
        "vision_tokens": ["B", "T_img", model.vision_tokenizer.num_tokens(), model.vision_tokenizer.dim_out],
        "lang_x": ["B", "T_txt"],
        "logits": ["B", "T_txt", config.first_added_id + len(config.added_tokens)],
    }


def _describe_tokens(model: VLM, tokenizer: PreTrainedTokenizerBase | None) -> TokenDescription:
    config, special = model.config, None
    if tokenizer is not None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return TokenDescription(
        added=config.added_ids,
        media=config.media_token_id,
        pad=config.pad_token_id,
        stop=list(stop_token_ids(model.generation_config)) or None,
        special=special,
    )
