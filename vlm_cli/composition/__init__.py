"""Compositions: which parts make up a model, their settings, what trains, and how a user writes it all down."""

from vlm_cli.composition.composition import UNTILED, Choice, Composition, read_tiling
from vlm_cli.composition.families import FAMILIES
from vlm_cli.composition.files import keep_trained_settings, merge, parse_override, read_file, split_name
from vlm_cli.composition.language_model_types import UNSUITABLE_LANGUAGE_MODELS
from vlm_cli.composition.options import (
    END_OF_CHUNK,
    MEDIA_TOKEN,
    PARTS,
    Activation,
    CAbstractorOptions,
    CrossAttentionOptions,
    GatedFusionOptions,
    LanguageModelOptions,
    LanguageStreamOptions,
    LatentAttentionOptions,
    LinearOptions,
    LlamaCrossAttentionOptions,
    MapActivation,
    MLPOptions,
    PerceiverOptions,
    QFormerOptions,
    SeveralEncoderOptions,
    VisionEncoderOptions,
)
from vlm_cli.composition.request import CompositionRequest
from vlm_cli.composition.tiling import AnyresOptions, GridOptions, SplitOptions, TilingOptions, limit_tiles

__all__ = [
    "END_OF_CHUNK",
    "FAMILIES",
    "MEDIA_TOKEN",
    "PARTS",
    "UNSUITABLE_LANGUAGE_MODELS",
    "UNTILED",
    "Activation",
    "AnyresOptions",
    "CAbstractorOptions",
    "Choice",
    "Composition",
    "CompositionRequest",
    "CrossAttentionOptions",
    "GatedFusionOptions",
    "GridOptions",
    "LanguageModelOptions",
    "LanguageStreamOptions",
    "LatentAttentionOptions",
    "LinearOptions",
    "LlamaCrossAttentionOptions",
    "MLPOptions",
    "MapActivation",
    "PerceiverOptions",
    "QFormerOptions",
    "SeveralEncoderOptions",
    "SplitOptions",
    "TilingOptions",
    "VisionEncoderOptions",
    "keep_trained_settings",
    "limit_tiles",
    "merge",
    "parse_override",
    "read_file",
    "read_tiling",
    "split_name",
]
