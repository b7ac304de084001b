"""Settings of each part, one frozen dataclass per part, and the names that all parts share.

Plain data: nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vlm_cli.errors import CompositionError
from vlm_cli.schema import show

__all__ = [
    "END_OF_CHUNK",
    "MEDIA_TOKEN",
    "PARTS",
    "Activation",
    "CrossAttentionOptions",
    "GatedFusionOptions",
    "LanguageModelOptions",
    "LanguageStreamOptions",
    "LinearOptions",
    "LlamaCrossAttentionOptions",
    "MLPOptions",
    "PerceiverOptions",
    "QFormerOptions",
    "VisionEncoderOptions",
]

MEDIA_TOKEN = "<image>"
END_OF_CHUNK = "<|endofchunk|>"

#: The groups of parameters that a composition trains or freezes as a whole.
PARTS = ("vision_encoder", "vision_tokenizer", "fusion", "added_tokens", "language_model")

#: The activation between the two linear maps of a feed-forward.
Activation = Literal["gelu", "relu", "squared_relu"]


#: The most that a setting may be. A larger number is a mistake, or an attempt to fill the memory.
_MOST = {
    "depth": 1_000,
    "num_heads": 1_024,
    "head_dim": 16_384,
    "num_latents": 65_536,
    "num_queries": 65_536,
    "ff_mult": 1_024,
    "pixel_shuffle": 64,
    "image_size": 16_384,
    "every": 10_000,
    "first": 10_000,
    "cross_attention_every": 1_000,
}
_MOST_CHANNELS = 1_000_000  # of every other setting


def _check_sizes(options: Any, *names: str, or_zero: Sequence[str] = ()) -> None:
    """Check that each setting of `names` is None or 1 or more, each of `or_zero` None or 0 or more, and none too large.

    Raises:
        CompositionError: with a problem for each setting that is too small or too large.
    """
    problems = []
    for name, least in (*((x, 1) for x in names), *((x, 0) for x in or_zero)):
        value, most = getattr(options, name), _MOST.get(name, _MOST_CHANNELS)
        if value is not None and value < least:
            problems.append(f"{name} must be at least {least}, got {show(value)}.")
        elif value is not None and value > most:
            problems.append(f"{name} must be at most {most:,}, got {show(value)}.")
    if problems:
        raise CompositionError(problems)


# -- vision tokenizers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PerceiverOptions:
    """Settings of a Perceiver Resampler; the defaults are OpenFlamingo's."""

    depth: int = 6  # attention + feed-forward layers
    num_heads: int = 8
    head_dim: int = 64  # channels per head
    num_latents: int = 64  # vision tokens per medium
    ff_mult: int = 4  # hidden channels of the feed-forward over its width
    activation: Activation = "gelu"  # of the feed-forward; flamingo-mini: squared_relu, IDEFICS: relu
    qk_norm: bool = False  # LayerNorm over the head channels of queries and keys (IDEFICS)
    max_num_frames: int | None = None  # length of the frame embeddings; None: no frame embeddings
    max_num_media: int | None = None  # length of the media-time embeddings; None: no media-time embeddings
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        sizes = ("depth", "num_heads", "head_dim", "num_latents", "ff_mult")
        _check_sizes(self, *sizes, "max_num_frames", "max_num_media", "dim_out")


@dataclass(frozen=True, kw_only=True)
class QFormerOptions:
    """Sizes of a Q-Former; the defaults are BLIP-2's."""

    num_queries: int = 32  # vision tokens per medium
    depth: int = 12
    dim: int = 768
    num_heads: int = 12
    dim_ff: int = 3072  # hidden channels of the feed-forward
    cross_attention_every: int = 2  # layers
    dropout: float = 0.1
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        sizes = ("num_queries", "depth", "dim", "num_heads", "dim_ff", "cross_attention_every", "dim_out")
        _check_sizes(self, *sizes)
        if self.dim % self.num_heads:
            raise CompositionError(
                f"dim must be a multiple of num_heads, got dim={self.dim} and num_heads={self.num_heads}."
            )
        if not 0 <= self.dropout < 1:
            raise CompositionError(f"dropout must be in [0, 1), got {show(self.dropout)}.")


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """Settings of a linear projection."""

    frames: Literal["concatenate", "mean"] = "concatenate"  # a video gives F·v tokens, or v tokens averaged over F
    bias: bool = True  # of the projection; nanoVLM: False
    pixel_shuffle: int = 1  # s×s neighbouring patches become one token of s² times the channels (nanoVLM)
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        _check_sizes(self, "pixel_shuffle", "dim_out")


@dataclass(frozen=True, kw_only=True)
class MLPOptions(LinearOptions):
    """Settings of a two-layer projection; its hidden layer is as wide as its output."""


# -- fusions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GatedFusionOptions:
    """Settings that every fusion with gated cross-attention blocks has."""

    every: int = 1  # decoder layers from one block to the next
    first: int | None = None  # number of the first decoder layer with a block; None: every - 1
    attend: Literal["last", "all"] = "last"  # text sees the latest medium, or all media so far
    num_heads: int = 8
    head_dim: int = 64  # channels per head

    def __post_init__(self) -> None:
        _check_sizes(self, "every", "num_heads", "head_dim", *self._own_sizes(), or_zero=("first",))

    def _own_sizes(self) -> tuple[str, ...]:
        """Settings of a subclass that must be at least 1."""
        return ()


@dataclass(frozen=True, kw_only=True)
class CrossAttentionOptions(GatedFusionOptions):
    """Settings of the gated cross-attention; the defaults are OpenFlamingo's."""

    ff_mult: int = 4  # hidden channels of the feed-forward over its width
    activation: Activation = "gelu"  # of the feed-forward; flamingo-mini: squared_relu
    feed_forward_before_media: bool = True  # whether text before its row's first medium gets the feed-forward

    def _own_sizes(self) -> tuple[str, ...]:
        return ("ff_mult",)


@dataclass(frozen=True, kw_only=True)
class LlamaCrossAttentionOptions(GatedFusionOptions):
    """Settings of gated cross-attention blocks made like Llama's layers; the sizes are those of IDEFICS-9b."""

    first: int | None = 0  # number of the first decoder layer with a block; None: every - 1
    num_heads: int = 32
    head_dim: int = 128  # channels per head
    dim_ff: int = 11008  # hidden channels of the feed-forward
    qk_norm: bool = False  # RMSNorm over the head channels of queries and keys
    gate: Literal["scalar", "vector"] = "scalar"  # one number for a gate, or one for each channel
    norm_eps: float = 1e-6  # of every RMSNorm

    def _own_sizes(self) -> tuple[str, ...]:
        return ("dim_ff",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm_eps <= 1:
            raise CompositionError(f"norm_eps must be positive and at most 1, got {show(self.norm_eps)}.")


@dataclass(frozen=True, kw_only=True)
class LanguageStreamOptions:
    """Settings of the language stream: it has none."""


# -- vision encoder and language model ---------------------------------------------------------------------------------

#: Marks a setting that only OpenCLIP's towers understand.
_OPENCLIP = {"openclip": True}


@dataclass(frozen=True, kw_only=True)
class VisionEncoderOptions:
    """Which vision encoder, which weights, which layer.

    The options of an encoder of another package are a subclass. It may add settings, and it may declare `depth`,
    `class_token` or `norm` again to give the name another meaning: the new declaration lacks the mark of OpenCLIP.
    """

    name: str = ""  # OpenCLIP name, hf-hub:…, local-dir:…, path of an OpenCLIP JSON config, or a registered name
    pretrained: str | None = None  # tag or file of weights; None: random weights
    layer: int = -1  # -1 is the last layer, -2 the one before (LLaVA)
    image_size: int | None = None  # pixels; None: the size that the tower was made for
    depth: int | None = field(default=None, metadata=_OPENCLIP)  # layers kept; None: all. BLIP-2 keeps 39 of 40
    class_token: bool = field(
        default=False, metadata=_OPENCLIP
    )  # features begin with the class token (BLIP-2, IDEFICS)
    norm: bool | None = field(default=None, metadata=_OPENCLIP)  # apply the last norm; None: to the last layer only

    def __post_init__(self) -> None:
        if not -_MOST["depth"] <= self.layer < 0:
            raise CompositionError(
                f"layer counts from the end: -1 is the last, and -{_MOST['depth']:,} the least; got {show(self.layer)}."
            )
        _check_sizes(self, "image_size", *(["depth"] if "depth" in self.openclip_settings else []))

    @property
    def openclip_settings(self) -> dict[str, Any]:
        """`depth`, `class_token` and `norm`, as far as they mean OpenCLIP's setting and differ from its default."""
        mine = [f for f in fields(self) if "openclip" in f.metadata]
        return {f.name: value for f in mine if (value := getattr(self, f.name)) != f.default}

    @property
    def feature_arguments(self) -> dict[str, Any]:
        """Arguments of `VisionEncoder` that choose the features: `layer`, `class_token` and `norm`."""
        settings = self.openclip_settings
        return {"layer": self.layer, "class_token": settings.get("class_token", False), "norm": settings.get("norm")}


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """Which causal language model."""

    name: str = ""  # hub id, directory, or GGUF file
    revision: str | None = None  # branch, tag or commit of a hub id
    tokenizer: str | None = None  # hub id or directory of the tokenizer; None: the model's own
    decoder_layers: str | None = None  # dotted name of the decoder layers; None: found by structure
    head_bias: bool = False  # whether the head gets a bias, which trains with the added tokens (xGen-MM)
