"""Settings of each part, one frozen dataclass per part, and the names that all parts share.

Plain data: nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import isqrt
from typing import Any, Literal

from vlm_cli.errors import CompositionError
from vlm_cli.schema import show

__all__ = [
    "END_OF_CHUNK",
    "MEDIA_TOKEN",
    "PARTS",
    "Activation",
    "CAbstractorOptions",
    "CrossAttentionOptions",
    "GatedFusionOptions",
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
    "VisionEncoderOptions",
]

MEDIA_TOKEN = "<image>"
END_OF_CHUNK = "<|endofchunk|>"

#: The groups of parameters that a composition trains or freezes as a whole.
PARTS = ("vision_encoder", "vision_tokenizer", "fusion", "added_tokens", "language_model")

#: The activation between the two linear maps of a feed-forward.
Activation = Literal["gelu", "relu", "squared_relu"]

#: The activation between the linear maps of an `mlp`; `swiglu` halves the channels.
MapActivation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "softmax", "swiglu"]

#: Marks a setting that descriptions leave out while it has its default.
_RARE = {"rare": True}


#: The most that a setting may be. A larger number is a mistake, or an attempt to fill the memory.
_MOST = {
    "depth": 1_000,
    "num_heads": 1_024,
    "head_dim": 16_384,
    "num_latents": 65_536,
    "num_queries": 65_536,
    "ff_mult": 1_024,
    "pixel_shuffle": 64,
    "pool": 1_024,
    "convolutions": 8,
    "map_depth": 64,
    "image_size": 16_384,
    "every": 10_000,
    "first": 10_000,
    "cross_attention_every": 1_000,
}
_MOST_ENCODERS = 8  # of one model
_MOST_LAYERS_READ = 64  # of one vision encoder
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
    frames: Literal["together", "apart"] = field(default="together", metadata=_RARE)  # num_latents for each (xGen-MM)
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
    frames: Literal["together", "apart"] = field(default="together", metadata=_RARE)  # apart: num_queries for each
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
    """Settings of a linear projection, in the order in which they apply.

    Of one frame's grid of patches: `pixel_shuffle`, `pool` or `convolutions`, the map, `pool` if it comes after,
    `scale`.
    """

    frames: Literal["concatenate", "mean"] = "concatenate"  # a video gives F·v tokens, or v tokens averaged over F
    bias: bool = True  # of the projection; nanoVLM: False
    pixel_shuffle: int = 1  # s×s neighbouring patches become one token of s² times the channels (nanoVLM)
    shuffle_order: Literal["patches", "channels"] = field(default="patches", metadata=_RARE)  # channels: Mistral 3
    pad: bool = field(default=False, metadata=_RARE)  # zeros fill the grid to a multiple of pixel_shuffle (Ovis2)
    pool: int = field(default=1, metadata=_RARE)  # p×p neighbours become one token (Gemma 3: 4)
    pool_by: Literal["average", "bilinear"] = field(default="average", metadata=_RARE)  # bilinear: LLaVA-OneVision
    pool_at: Literal["before", "after"] = field(default="before", metadata=_RARE)  # after the map: Perception-LM
    convolutions: int = field(default=0, metadata=_RARE)  # of 3×3 patches; each halves rows and columns (GOT-OCR: 2)
    norm: Literal["layer", "rms", "gemma"] | None = field(default=None, metadata=_RARE)  # gemma: RMSNorm by 1 + weight
    norm_at: Literal["patches", "before", "after"] = field(default="before", metadata=_RARE)  # of the map
    norm_eps: float = field(default=1e-5, metadata=_RARE)
    scale: float = field(default=1.0, metadata=_RARE)  # factor of the tokens
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        _check_sizes(self, "pixel_shuffle", "pool", "dim_out", *self._own_sizes(), or_zero=("convolutions",))
        problems = []
        merging = [f"pool={self.pool}"] if self.pool > 1 and self.pool_at == "before" else []
        merging += [f"pixel_shuffle={self.pixel_shuffle}"] if self.pixel_shuffle > 1 else []
        merging += [f"convolutions={self.convolutions}"] if self.convolutions else []
        if len(merging) > 1:
            remedy = ", or set pool_at to after" if "pool=" in merging[0] else ""
            count = "both" if len(merging) == 2 else "all"
            problems.append(f"{' and '.join(merging)} {count} merge patches before the map. Keep one of them{remedy}.")
        if self.pad and self.pixel_shuffle == 1:
            problems.append("pad fills the grid for pixel_shuffle, which is 1. Set pixel_shuffle, or leave pad out.")
        if not 0 < self.norm_eps <= 1:
            problems.append(f"norm_eps must be positive and at most 1, got {show(self.norm_eps)}.")
        if not 0 < abs(self.scale) <= 1e6:
            problems.append(f"scale must be a number other than 0, at most 1,000,000, got {show(self.scale)}.")
        if problems:
            raise CompositionError(problems)

    def _own_sizes(self) -> tuple[str, ...]:
        """Settings of a subclass that must be at least 1."""
        return ()


@dataclass(frozen=True, kw_only=True)
class MLPOptions(LinearOptions):
    """Settings of a projection of several linear maps; the default is LLaVA-1.5's two, as wide as the output."""

    map_depth: int = field(default=2, metadata=_RARE)  # linear maps (Prismatic: 3)
    activation: MapActivation = field(default="gelu", metadata=_RARE)  # between two maps; swiglu: Aya Vision
    dim_hidden: int | None = field(default=None, metadata=_RARE)  # channels after the first map; None: dim_out
    hidden_norm: Literal["layer"] | None = field(default=None, metadata=_RARE)  # before each activation (Ovis2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map_depth < 2:
            raise CompositionError("map_depth must be at least 2. For a single map, choose the type linear.")

    def _own_sizes(self) -> tuple[str, ...]:
        return ("map_depth", "dim_hidden")


@dataclass(frozen=True, kw_only=True)
class CAbstractorOptions:
    """Sizes of a C-abstractor; the defaults are Honeybee's."""

    num_queries: int = 144  # vision tokens of a frame; the square of a whole number
    depth: int = 3  # blocks of convolutions before the pooling, and as many after it
    dim: int = 1024  # channels of the convolutions
    map_depth: int = 2  # linear maps after the convolutions
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        _check_sizes(self, "num_queries", "depth", "dim", "map_depth", "dim_out")
        if isqrt(self.num_queries) ** 2 != self.num_queries:
            raise CompositionError(
                f"num_queries must be the square of a whole number, such as {isqrt(self.num_queries) ** 2 or 1}, got "
                f"{self.num_queries}."
            )


@dataclass(frozen=True, kw_only=True)
class LatentAttentionOptions:
    """Sizes of an attention of latents to patches; the defaults are Kosmos-2's."""

    num_latents: int = 64  # vision tokens per medium
    num_heads: int = 32
    unit_length: bool = True  # the channels of each feature are scaled to length 1
    frames: Literal["together", "apart"] = field(default="together", metadata=_RARE)  # apart: num_latents for each
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        _check_sizes(self, "num_latents", "num_heads", "dim_out")


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
    num_kv_heads: int | None = field(default=None, metadata=_RARE)  # heads of keys and values; None: num_heads
    feed_forward_before_media: bool = field(default=True, metadata=_RARE)  # for text before its row's first medium
    attend_before_media: bool = field(default=False, metadata=_RARE)  # such text reads all media of the row (Mllama)

    def _own_sizes(self) -> tuple[str, ...]:
        return ("dim_ff", "num_kv_heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise CompositionError(f"num_kv_heads must divide num_heads ({self.num_heads}), got {self.num_kv_heads}.")
        if not 0 < self.norm_eps <= 1:
            raise CompositionError(f"norm_eps must be positive and at most 1, got {show(self.norm_eps)}.")


@dataclass(frozen=True, kw_only=True)
class LanguageStreamOptions:
    """Settings of the language stream."""

    #: What a position sees beside all positions before it: `image` the other positions of its picture (Gemma 3),
    #: `prefix` the whole prompt (PaliGemma).
    mask: Literal["causal", "image", "prefix"] = field(default="causal", metadata=_RARE)


# -- vision encoder and language model ---------------------------------------------------------------------------------

#: Marks a setting that only OpenCLIP's towers understand.
_OPENCLIP = {"openclip": True}


@dataclass(frozen=True, kw_only=True)
class VisionEncoderOptions:
    """Which vision encoder, which weights, which layer.

    The options of an encoder of another package are a subclass. It may add settings, and it may declare `depth`,
    `class_token` or `norm` again to give the name another meaning: the new declaration lacks the mark of OpenCLIP.
    """

    name: str = ""  # OpenCLIP name, hf:…, hf-hub:…, local-dir:…, path of an OpenCLIP JSON config, or a registered name
    pretrained: str | None = None  # tag or file of weights; None: random weights
    layer: int | tuple[int, ...] = -1  # -1 is the last layer, -2 the one before (LLaVA); a list concatenates channels
    image_size: int | None = None  # pixels; None: the size that the tower was made for
    depth: int | None = field(default=None, metadata=_OPENCLIP)  # layers kept; None: all. BLIP-2 keeps 39 of 40
    class_token: bool = field(
        default=False, metadata=_OPENCLIP
    )  # features begin with the class token (BLIP-2, IDEFICS)
    norm: bool | None = field(default=None, metadata=_OPENCLIP)  # apply the last norm; None: to the last layer only

    def __post_init__(self) -> None:
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))
        if not 1 <= len(self.layers) <= _MOST_LAYERS_READ:
            raise CompositionError(f"layer must name 1 to {_MOST_LAYERS_READ} layers, got {len(self.layers)}.")
        for layer in self.layers:
            if not -_MOST["depth"] <= layer < 0:
                raise CompositionError(
                    f"layer counts from the end: -1 is the last, and -{_MOST['depth']:,} the least; got {show(layer)}."
                )
        _check_sizes(self, "image_size", *(["depth"] if "depth" in self.openclip_settings else []))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, one or several."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

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
class SeveralEncoderOptions(VisionEncoderOptions):
    """Several vision encoders whose channels are concatenated; `name` follows from theirs."""

    encoders: tuple[VisionEncoderOptions, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", " + ".join(x.name for x in self.encoders))
        if not 2 <= len(self.encoders) <= _MOST_ENCODERS:
            raise CompositionError(f"a list must name 2 to {_MOST_ENCODERS} encoders, got {len(self.encoders)}.")
        if any(x.class_token for x in self.encoders):
            raise CompositionError("class_token does not go with several encoders, which share one grid of patches.")


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """Which causal language model."""

    name: str = ""  # hub id, directory, or GGUF file
    revision: str | None = None  # branch, tag or commit of a hub id
    tokenizer: str | None = None  # hub id or directory of the tokenizer; None: the model's own
    decoder_layers: str | None = None  # dotted name of the decoder layers; None: found by structure
    head_bias: bool = False  # whether the head gets a bias, which trains with the added tokens (xGen-MM)
