"""A composition: which part stands in each of the four places, its settings, and what trains.

Plain data without torch: it is read from YAML, JSON or flags, compared, printed and written back.
A family is a named composition and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vlm_cli.errors import CompositionError
from vlm_cli.registry import FUSIONS, VISION_ENCODERS, VISION_TOKENIZERS, Registry, suggest

__all__ = [
    "END_OF_CHUNK",
    "FAMILIES",
    "MEDIA_TOKEN",
    "PARTS",
    "UNSUITABLE_LANGUAGE_MODELS",
    "Composition",
    "CrossAttentionOptions",
    "LanguageModelOptions",
    "LanguageStreamOptions",
    "LinearOptions",
    "LlamaCrossAttentionOptions",
    "MLPOptions",
    "PerceiverOptions",
    "QFormerOptions",
    "VisionEncoderOptions",
    "split_name",
]

MEDIA_TOKEN = "<image>"
END_OF_CHUNK = "<|endofchunk|>"

#: What can be trained or frozen as one.
PARTS = ("vision_encoder", "vision_tokenizer", "fusion", "added_tokens", "language_model")


#: Types that AutoModelForCausalLM lists although none of them can stand alone as an autoregressive text decoder.
_UNSUITABLE = {
    "an encoder whose published weights are not causal": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
    ),
    "the decoder half of an encoder-decoder model": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper"
    ),
    "not causal: later tokens change earlier logits": "xlm xlnet cpmant",
    "a model of audio codebooks, not of text": "musicgen musicgen_melody",
    "a drafter that needs the cache of another model": "gemma4_assistant gemma4_unified_assistant",
    "a model of byte patches whose forward fails in Transformers itself": "blt",
    "a reversible model, whose backward pass runs its layers again without what is hooked to them": "reformer",
}
#: Type -> why it cannot be the language model of a VLM.
UNSUITABLE_LANGUAGE_MODELS = {name: reason for reason, names in _UNSUITABLE.items() for name in names.split()}


def _at_least_one(options: Any, *names: str, or_zero: Sequence[str] = ()) -> None:
    """Raise unless each setting of `names` is None or at least 1, and each of `or_zero` None or at least 0."""
    problems = [
        f"{name} must be at least {least}, got {value}."
        for name, least in (*((x, 1) for x in names), *((x, 0) for x in or_zero))
        if (value := getattr(options, name)) is not None and value < least
    ]
    if problems:
        raise CompositionError(problems)


#: Between the two linear maps of a feed-forward.
Activation = Literal["gelu", "relu", "squared_relu"]


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
    max_num_frames: int | None = None  # length of the frame embeddings; None: frames are not told apart
    max_num_media: int | None = None  # length of the media-time embeddings; None: media are not numbered
    dim_out: int | None = None  # output channels; None: what the fusion asks for

    def __post_init__(self) -> None:
        sizes = ("depth", "num_heads", "head_dim", "num_latents", "ff_mult")
        _at_least_one(self, *sizes, "max_num_frames", "max_num_media", "dim_out")


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
    dim_out: int | None = None  # output channels; None: what the fusion asks for

    def __post_init__(self) -> None:
        sizes = ("num_queries", "depth", "dim", "num_heads", "dim_ff", "cross_attention_every", "dim_out")
        _at_least_one(self, *sizes)
        if self.dim % self.num_heads:
            raise CompositionError(
                f"dim must be a multiple of num_heads, got dim={self.dim} and num_heads={self.num_heads}."
            )
        if not 0 <= self.dropout < 1:
            raise CompositionError(f"dropout must be in [0, 1), got {self.dropout}.")


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """Settings of a linear projection."""

    frames: Literal["concatenate", "mean"] = "concatenate"  # F·v tokens of a video, or v averaged ones
    bias: bool = True  # of the projection; nanoVLM: False
    pixel_shuffle: int = 1  # s×s neighbouring patches become one token of s² times the channels (nanoVLM)
    dim_out: int | None = None  # output channels; None: what the fusion asks for

    def __post_init__(self) -> None:
        _at_least_one(self, "pixel_shuffle", "dim_out")


@dataclass(frozen=True, kw_only=True)
class MLPOptions(LinearOptions):
    """Settings of a two-layer projection; its hidden layer is as wide as its output."""


@dataclass(frozen=True, kw_only=True)
class CrossAttentionOptions:
    """Settings of the gated cross-attention; the defaults are OpenFlamingo's."""

    every: int = 1  # decoder layers from one block to the next
    first: int | None = None  # number of the first decoder layer with a block; None: every - 1
    attend: Literal["last", "all"] = "last"  # text sees the latest medium, or all media so far
    num_heads: int = 8
    head_dim: int = 64  # channels per head
    ff_mult: int = 4  # hidden channels of the feed-forward over its width
    activation: Activation = "gelu"  # of the feed-forward; flamingo-mini: squared_relu
    feed_forward_before_media: bool = True  # whether text before its row's first medium gets the feed-forward

    def __post_init__(self) -> None:
        _at_least_one(self, "every", "num_heads", "head_dim", "ff_mult", or_zero=("first",))


@dataclass(frozen=True, kw_only=True)
class LlamaCrossAttentionOptions:
    """Settings of gated cross-attention blocks made like Llama's layers; the sizes are those of IDEFICS-9b."""

    every: int = 1  # decoder layers from one block to the next
    first: int | None = 0  # number of the first decoder layer with a block; None: every - 1
    attend: Literal["last", "all"] = "last"  # text sees the latest medium, or all media so far
    num_heads: int = 32
    head_dim: int = 128  # channels per head
    dim_ff: int = 11008  # hidden channels of the feed-forward
    qk_norm: bool = False  # RMSNorm over the head channels of queries and keys
    gate: Literal["scalar", "vector"] = "scalar"  # one number for a gate, or one for each channel
    norm_eps: float = 1e-6  # of every RMSNorm

    def __post_init__(self) -> None:
        _at_least_one(self, "every", "num_heads", "head_dim", "dim_ff", or_zero=("first",))
        if not self.norm_eps > 0:
            raise CompositionError(f"norm_eps must be positive, got {self.norm_eps}.")


@dataclass(frozen=True, kw_only=True)
class LanguageStreamOptions:
    """The language stream has no settings."""


@dataclass(frozen=True, kw_only=True)
class VisionEncoderOptions:
    """Which OpenCLIP tower, which weights, which layer; an encoder of another package may add settings of its own."""

    name: str = ""  # OpenCLIP name, hf-hub:…, local-dir:…, path of an OpenCLIP JSON config, or a registered name
    pretrained: str | None = None  # tag or file of weights; None: random
    layer: int = -1  # -1 is the last layer, -2 the one before (LLaVA)
    image_size: int | None = None  # pixels; None: what the tower was made for
    depth: int | None = None  # layers kept; None: all. BLIP-2 keeps 39 of 40
    class_token: bool = False  # whether the features begin with the class token (BLIP-2, IDEFICS, flamingo-mini)
    norm: bool | None = None  # whether the tower's last norm is applied; None: to its last layer only

    def __post_init__(self) -> None:
        if self.layer >= 0:
            raise CompositionError(f"layer counts from the end: -1 is the last; got {self.layer}.")
        _at_least_one(self, "image_size", *(["depth"] if self._is_ours("depth") else []))

    def _is_ours(self, name: str) -> bool:
        """Whether a field is declared here, and not by a subclass, which may mean another thing by its name."""
        fields = VisionEncoderOptions.__dataclass_fields__
        return type(self).__dataclass_fields__[name] is fields[name]

    @property
    def of_openclip(self) -> dict[str, Any]:
        """`depth`, `class_token` and `norm`, which only OpenCLIP's towers have, where they are not the defaults."""
        fields = VisionEncoderOptions.__dataclass_fields__
        found = {name: getattr(self, name) for name in ("depth", "class_token", "norm") if self._is_ours(name)}
        return {name: value for name, value in found.items() if value != fields[name].default}

    @property
    def reading(self) -> dict[str, Any]:
        """Which features of its tower a `VisionEncoder` returns: `layer`, `class_token` and `norm`, as arguments."""
        found = {"class_token": False, "norm": None, **self.of_openclip}
        return {"layer": self.layer, "class_token": found["class_token"], "norm": found["norm"]}


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """Which causal language model."""

    name: str = ""  # hub id, directory, or GGUF file
    revision: str | None = None  # branch, tag or commit of a hub id
    tokenizer: str | None = None  # hub id or directory of the tokenizer; None: the model's own
    decoder_layers: str | None = None  # dotted name of the decoder layers; None: found by structure
    head_bias: bool = False  # whether the head gets a bias, which trains with the added tokens (xGen-MM)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The part that stands in one place: its registered name and its settings."""

    type: str
    options: Any

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **dataclasses.asdict(self.options)}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One choice for each of the four parts, the tokens that are added, and what trains."""

    family: str | None = None
    vision_encoder: VisionEncoderOptions
    vision_tokenizer: Choice
    fusion: Choice
    language_model: LanguageModelOptions
    added_tokens: tuple[str, ...] = (MEDIA_TOKEN,)
    trainable: tuple[str, ...] = ("vision_tokenizer", "fusion", "added_tokens")
    weight_decay: float = 0.0
    weight_decay_on: tuple[str, ...] = PARTS

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Composition:
        """Read a composition.

        Raises:
            CompositionError: with every problem that was found, at once.
        """
        return _Reader(data).composition()

    @classmethod
    def compose(
        cls,
        family: str | None = None,
        *layers: Mapping[str, Any],
        overrides: Sequence[str] = (),
    ) -> Composition:
        """A family's preset, overlaid with each of `layers`, then with dotted `name=value` overrides.

        Raises:
            CompositionError: with everything that does not fit, an unknown family included.
        """
        problems: list[str] = []
        layers = (*layers, *_parse_overrides(overrides, problems))
        chosen = family or next((x["family"] for x in reversed(layers) if x.get("family")), None)
        is_known = chosen is None or (isinstance(chosen, str) and chosen in FAMILIES)
        if not is_known:
            problems.append(f"unknown family {chosen!r}.{suggest(str(chosen), FAMILIES)} Known: {', '.join(FAMILIES)}.")
        merged = FAMILIES[chosen] if chosen and is_known else {}
        for layer in layers:
            merged = merge(merged, layer)
        return _Reader({**merged, "family": chosen}, problems, is_whole=is_known).composition()

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return {
            "family": self.family,
            "vision_encoder": dataclasses.asdict(self.vision_encoder),
            "vision_tokenizer": self.vision_tokenizer.to_dict(),
            "fusion": self.fusion.to_dict(),
            "language_model": dataclasses.asdict(self.language_model),
            "added_tokens": list(self.added_tokens),
            "trainable": list(self.trainable),
            "weight_decay": self.weight_decay,
            "weight_decay_on": list(self.weight_decay_on),
        }


@dataclass
class _Reader:
    """Turns plain data into a composition, collecting problems instead of stopping at the first.

    Args:
        data: the composition.
        problems: those that are known already.
        is_whole: whether a part that is absent is a problem.
    """

    data: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    is_whole: bool = True

    def composition(self) -> Composition:
        fields = [f.name for f in dataclasses.fields(Composition)]
        self.problems += [
            f"unknown key {key!r}.{suggest(str(key), fields)} Known: {', '.join(fields)}."
            for key in self.data
            if key not in fields
        ]
        vision_encoder = self.vision_encoder()
        language_model = self.options("language_model", LanguageModelOptions, self.settings("language_model"))
        for name, part in (("vision_encoder", vision_encoder), ("language_model", language_model)):
            if part is not None and not part.name and self.is_whole:
                flag = name.replace("_", "-")
                self.problems.append(f"no {name.replace('_', ' ')} is named. Add --{flag}, or {name}.name.")
        vision_tokenizer = self.choice("vision_tokenizer", VISION_TOKENIZERS)
        fusion = self.choice("fusion", FUSIONS)
        added_tokens = self.names("added_tokens", (MEDIA_TOKEN,))
        if MEDIA_TOKEN not in added_tokens:
            self.problems.append(f"added_tokens must hold {MEDIA_TOKEN!r}, got {list(added_tokens)}.")
        trainable = self.names("trainable", ("vision_tokenizer", "fusion", "added_tokens"), PARTS)
        weight_decay = self.number("weight_decay", 0.0)
        weight_decay_on = self.names("weight_decay_on", PARTS, PARTS)
        if self.problems:
            readable = {"vision_encoder": vision_encoder or self.named_encoder(), "language_model": language_model}
            raise CompositionError(self.problems, readable)
        return Composition(
            family=self.data.get("family"),
            vision_encoder=vision_encoder,
            vision_tokenizer=vision_tokenizer,
            fusion=fusion,
            language_model=language_model,
            added_tokens=added_tokens,
            trainable=trainable,
            weight_decay=weight_decay,
            weight_decay_on=weight_decay_on,
        )

    def settings(self, part: str) -> Any:
        """What is said of a part that has no registered types; a bare string is its name."""
        value = self.data.get(part) or {}
        return {"name": value} if isinstance(value, str) else value

    def vision_encoder(self) -> Any:
        """Settings of the vision encoder, in the dataclass that belongs to its name."""
        value = self.settings("vision_encoder")
        name = value.get("name") if isinstance(value, Mapping) else None
        if isinstance(name, str) and value.get("pretrained") is None:
            value = {**value, **split_name(name)}
            name = value["name"]
        options: Any = VisionEncoderOptions
        if isinstance(name, str) and name in VISION_ENCODERS:
            options = VISION_ENCODERS[name].options_class()
        return self.options("vision_encoder", options, value)

    def named_encoder(self) -> VisionEncoderOptions | None:
        """The vision encoder whose settings do not fit, by its name alone: they may be those of a package that is not
        installed."""
        value = self.settings("vision_encoder")
        name = value.get("name") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name in VISION_ENCODERS:
            return None
        return VisionEncoderOptions(name=split_name(name)["name"] or "")

    def choice(self, name: str, registry: Registry) -> Any:
        value = self.data.get(name)
        value = {"type": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            flag = name.replace("_", "-")
            if self.is_whole:
                self.problems.append(
                    f"no {registry.kind} is chosen. Add --family ({', '.join(FAMILIES)}) or --{flag} "
                    f"({', '.join(registry)})."
                )
            return None
        if value["type"] not in registry:
            self.problems.append(registry.unknown(value["type"]))
            return None
        settings = {key: x for key, x in value.items() if key != "type"}
        options = self.options(name, registry[value["type"]].options_class(), settings)
        return Choice(type=value["type"], options=options)

    def options(self, place: str, options: type, settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            self.problems.append(f"{place} must be a name or a mapping, got {settings!r}.")
            return None
        hints = get_type_hints(options)
        found = len(self.problems)
        for key, value in settings.items():
            if key not in hints:
                known = ", ".join(hints) or "none"
                self.problems.append(f"unknown key {place}.{key}.{suggest(str(key), hints)} Known: {known}.")
            elif problem := _misfit(hints[key], value):
                self.problems.append(f"{place}.{key} must be {problem}, got {value!r}.")
        if len(self.problems) > found:
            return None
        try:
            return options(**settings)
        except CompositionError as error:
            self.problems += [f"{place}.{problem}" for problem in error.problems]
            return None

    def names(self, key: str, default: tuple[str, ...], known: Iterable[str] = ()) -> tuple[str, ...]:
        value = self.data.get(key, default)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
            self.problems.append(f"{key} must be a list of names, got {value!r}.")
            return default
        known = list(known)
        self.problems += [
            f"unknown part {x!r} in {key}.{suggest(x, known)} Known: {', '.join(known)}."
            for x in value
            if known and x not in known
        ]
        if len(set(value)) < len(value):
            self.problems.append(f"{key} names something twice: {list(value)}.")
        return tuple(value)

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key, default)
        if problem := _misfit(float, value):
            self.problems.append(f"{key} must be {problem}, got {value!r}.")
            return default
        return float(value)


def _misfit(hint: Any, value: Any) -> str | None:
    """What a value should have been, in words; None if it fits its annotation.

    >>> _misfit(int | None, "x")
    'a whole number or null'
    """
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) in (types.UnionType, typing.Union):
        inner = [x for x in get_args(hint) if x is not type(None)]
        return None if value is None else f"{_misfit(inner[0], value)} or null" if _misfit(inner[0], value) else None
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else " or ".join(map(repr, get_args(hint)))
    # A bool is an int in Python, but `depth: true` is a mistake.
    accepts = (int, float) if hint is float else hint
    fits = isinstance(value, accepts) and (hint is bool or not isinstance(value, bool))
    return None if fits else words[hint]


def split_name(text: str) -> dict[str, str | None]:
    """`name[:tag]` as settings of a vision encoder; hf-hub:, local-dir: and paths have no tag.

    >>> split_name("ViT-L-14:openai")
    {'name': 'ViT-L-14', 'pretrained': 'openai'}
    >>> split_name("hf-hub:timm/ViT-B-16-SigLIP")
    {'name': 'hf-hub:timm/ViT-B-16-SigLIP', 'pretrained': None}
    """
    if text.startswith(("hf-hub:", "local-dir:")) or text.endswith(".json"):
        return {"name": text, "pretrained": None}
    name, _, tag = text.partition(":")
    return {"name": name, "pretrained": tag or None}


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overlaid with `layer`, part by part; a part of another type brings none of the old settings.

    >>> merge({"fusion": {"type": "cross-attention", "every": 4}}, {"fusion": {"every": 2}})
    {'fusion': {'type': 'cross-attention', 'every': 2}}
    >>> merge({"fusion": {"type": "cross-attention", "every": 4}}, {"fusion": "language-stream"})
    {'fusion': {'type': 'language-stream'}}
    """
    short = {"vision_tokenizer": "type", "fusion": "type", "vision_encoder": "name", "language_model": "name"}
    result = dict(base)
    for key, value in layer.items():
        if key not in short:
            result[key] = value
            continue
        value = {short[key]: value} if isinstance(value, str) else value
        old = result.get(key) or {}
        old = {short[key]: old} if isinstance(old, str) else old
        if not isinstance(value, Mapping) or not isinstance(old, Mapping):
            result[key] = value
            continue
        identity = value.get(short[key])
        replaces = identity is not None and identity != old.get(short[key])
        result[key] = dict(value) if replaces else {**old, **value}
    return result


def parse_override(text: str) -> dict[str, Any]:
    """`part.setting=value` as nested data; the value is read as YAML.

    >>> parse_override("vision_tokenizer.num_latents=32")
    {'vision_tokenizer': {'num_latents': 32}}

    Raises:
        CompositionError: if it has no `=` or no name.
    """
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys) or len(keys) > 2:
        raise CompositionError(
            f"--set expects NAME=VALUE or PART.SETTING=VALUE, got {text!r}. "
            "Example: --set vision_tokenizer.num_latents=32"
        )
    try:
        result = _read_yaml(value)
    except ValueError as error:
        raise CompositionError(f"the value of --set {text!r} is not YAML: {error}.") from None
    for key in reversed(keys):
        result = {key: result}
    return result


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> list[dict[str, Any]]:
    parsed = []
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except CompositionError as error:
            problems += error.problems
    return parsed


def _read_yaml(text: str) -> Any:
    """
    >>> _read_yaml("[1e-4, 0.1]")
    [0.0001, 0.1]

    Raises:
        ValueError: if it is not YAML, with the place.
    """
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, character {mark.column + 1}: " if mark else ""
        raise ValueError(where + (getattr(error, "problem", None) or str(error))) from None


@functools.cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, to which 1e-4 is a number, as in YAML 1.2 and JSON; in YAML 1.1 it is text."""
    import yaml

    class Loader(yaml.SafeLoader): ...

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def read_file(path: Path) -> dict[str, Any]:
    """A composition file, YAML or JSON, as plain data; relative paths in it start at its folder.

    Raises:
        CompositionError: if it cannot be read, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else _read_yaml(text)
    except OSError as error:
        raise CompositionError(f"cannot read composition file {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise CompositionError(f"composition file {str(path)!r} is not valid: {error}.") from None
    if not isinstance(data, dict):
        raise CompositionError(
            f"composition file {str(path)!r} must hold a mapping of parts, got {type(data).__name__}."
        )
    for part in ("vision_encoder", "language_model"):
        if part in data:
            data[part] = _rooted(data[part], path.parent)
    return data


def _rooted(value: Any, folder: Path) -> Any:
    """A part whose relative paths start at `folder`, where something is there."""
    if isinstance(value, Mapping):
        files = ("name", "tokenizer", "pretrained")
        return {key: _rooted(x, folder) if key in files else x for key, x in value.items()}
    if not isinstance(value, str) or not value:
        return value
    scheme, _, rest = value.rpartition("local-dir:")
    return f"{'local-dir:' if scheme or value != rest else ''}{folder / rest}" if (folder / rest).exists() else value


#: Named compositions. Sources of the numbers: OpenFlamingo-4B (https://github.com/mlfoundations/open_flamingo),
#: Kosmos-1 (https://arxiv.org/abs/2302.14045), BLIP-2 (https://arxiv.org/abs/2301.12597), LLaVA
#: (https://arxiv.org/abs/2304.08485). What trains and decays follows the open_flamingo code base, and LLaVA's own
#: scripts for LLaVA, whose first stage is shown; its second adds `--trainable language_model`.
FAMILIES: dict[str, dict[str, Any]] = {
    "flamingo": {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai"},
        "vision_tokenizer": {"type": "perceiver"},
        "fusion": {"type": "cross-attention"},
        "language_model": {"name": "togethercomputer/RedPajama-INCITE-Base-3B-v1"},
        "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
        "trainable": ["vision_tokenizer", "fusion", "added_tokens"],
        "weight_decay": 0.1,
        "weight_decay_on": ["fusion"],
    },
    "kosmos": {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai"},
        "vision_tokenizer": {"type": "perceiver"},
        "fusion": {"type": "language-stream"},
        "language_model": {"name": "facebook/opt-1.3b"},
        "trainable": ["vision_tokenizer", "fusion", "added_tokens", "language_model"],
        "weight_decay": 0.01,
    },
    "blip": {
        "vision_encoder": {"name": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k"},
        "vision_tokenizer": {"type": "qformer"},
        "fusion": {"type": "language-stream"},
        "language_model": {"name": "facebook/opt-2.7b"},
        "trainable": ["vision_tokenizer", "added_tokens"],
        "weight_decay": 0.05,
    },
    "llava": {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai"},
        "vision_tokenizer": {"type": "linear"},
        "fusion": {"type": "language-stream"},
        "language_model": {"name": "lmsys/vicuna-7b-v1.5"},
        "trainable": ["vision_tokenizer", "added_tokens"],
        "weight_decay": 0.0,
    },
}
