"""Registries: names of exchangeable parts, and the classes that they stand for.

A registry holds import targets, not classes, so that listing names and checking a composition needs no torch. Other
packages register parts through entry points of the groups named below, and the built-in parts are registered in the
same way.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vlm_cli.errors import PluginError, UnknownNameError, first_line

__all__ = [
    "ENCODER_TYPES",
    "FUSIONS",
    "TILINGS",
    "VISION_ENCODERS",
    "VISION_TOKENIZERS",
    "Part",
    "RegisteredPart",
    "Registry",
    "encoder_type",
    "nearest",
    "suggest",
]


#: Of two names, from 0 to 1; "prompt" and "completion" have 0.5.
_LEAST_SIMILARITY = 0.6


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" with the nearest known name, or an empty string if none is near.

    A guess that shares only a few letters would mislead, and so would one without the owner that a hub id has.

    >>> suggest("percever", ["perceiver", "linear"])
    " Did you mean 'perceiver'?"
    >>> suggest("completion", ["prompt", "text"])
    ''
    """
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that the user may have meant, by a slip or as its beginning; None if there is none."""
    if len(name) > 100:  # to compare long texts takes long, and none of them is a name
        return None
    choices = {k.lower(): k for k in known if "/" in k or "/" not in name.strip("./")}
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=_LEAST_SIMILARITY)
    longer = [k for k in choices if len(name) > 2 and k.startswith(name.lower())]
    return choices[(near or longer)[0]] if near or longer else None


@dataclass(frozen=True)
class RegisteredPart:
    """One registered part: `target` and `options` are `module:attribute` import strings.

    `options` names the frozen dataclass of the part's settings, importable without torch.
    """

    name: str
    target: str
    options: str
    summary: str

    def load(self) -> Any:
        """Import and return the class that implements the part."""
        return _import(self.target)

    def options_class(self) -> Any:
        """Import and return the dataclass of the part's settings."""
        return _import(self.options)


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class _OutsidePart(RegisteredPart):
    """A part of another package. Error messages about it name the package.

    Attributes:
        origin: the part and its package, in words.
        methods: methods that the class must have.
        settings: fields that the dataclass of the settings must have.
    """

    origin: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]

    def load(self) -> Any:
        """Import and return the class that implements the part.

        Raises:
            PluginError: if it cannot be imported, or lacks a method.
        """
        with _blaming(self.origin):
            found = _import(self.target)
        self._check(self.target, "method", [x for x in self.methods if not callable(getattr(found, x, None))])
        return found

    def options_class(self) -> Any:
        """Import and return the dataclass of the part's settings.

        Raises:
            PluginError: if it cannot be imported, is no dataclass, or lacks a setting.
        """
        with _blaming(self.origin):
            found = _import(self.options)
            fields = {f.name for f in dataclasses.fields(found)}
        self._check(self.options, "setting", [x for x in self.settings if x not in fields])
        return found

    def _check(self, target: str, what: str, missing: list[str]) -> None:
        if missing:
            raise PluginError(
                f"{self.origin} cannot be used: {target} lacks the {what} {', '.join(missing)}. "
                f"See docs/composition.md, parts of your own. {_REMEDY}"
            )


#: The name of `RegisteredPart` in earlier versions, which packages may still import.
Part = RegisteredPart

_REMEDY = "Upgrade or uninstall that package."


@contextmanager
def _blaming(origin: str) -> Iterator[None]:
    """Turn any error of another package's code into a PluginError that names the package."""
    try:
        yield
    except (Exception, SystemExit) as error:  # importing a script may end the process
        raise PluginError(
            f"{origin} cannot be loaded: {type(error).__name__}: {first_line(error)}. {_REMEDY}"
        ) from error


class Registry:
    """A dictionary of parts. It refuses a second owner of a name, and suggests the nearest name for an unknown one.

    It imports another package's module only when somebody asks for its part, so that a broken package harms no other.

    Args:
        kind: what the registry holds, in words, for messages ("vision tokenizer").
        group: entry-point group. An entry point has the name of a part, and loads to the part's `RegisteredPart`.
        methods: methods that the class of a part must have.
        settings: fields that the dataclass of a part's settings must have.
    """

    def __init__(self, kind: str, group: str, *, methods: Sequence[str] = (), settings: Sequence[str] = ()) -> None:
        self.kind = kind
        self.group = group
        self.methods = tuple(methods)
        self.settings = tuple(settings)
        self._built_in: dict[str, RegisteredPart] = {}

    def add(self, part: RegisteredPart) -> None:
        """Register a part.

        Raises:
            ValueError: if the name is taken.
        """
        if part.name in self:
            raise ValueError(f"{self.kind} {part.name!r} is already registered.")
        self._built_in[part.name] = part

    @cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        """Entry points of installed packages: name -> all that have it."""
        points: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            points.setdefault(point.name, []).append(point)
        return points

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the built-in parts, then of those of installed packages."""
        return iter(dict.fromkeys([*self._built_in, *self._points]))

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._points

    def __getitem__(self, name: str) -> RegisteredPart:
        """Return the part of a name.

        Raises:
            UnknownNameError: if there is no such part.
            PluginError: if the package that brings it is broken, or another package has the same name.
        """
        if name not in self:
            raise UnknownNameError(self.unknown(name))
        points = self._points.get(name, [])
        owners = ["vlm-cli"] * (name in self._built_in) + [_package(point) for point in points]
        if len(owners) > 1:
            raise PluginError(
                f"{self.kind} {name!r} is registered by {' and by '.join(owners)}. Uninstall one of them."
            )
        return self._outside(points[0]) if points else self._built_in[name]

    def summaries(self) -> dict[str, str]:
        """Return a summary of each part, by name. For a part of a broken package, it says what is wrong."""
        found = {}
        for name in self:
            try:
                found[name] = self[name].summary
            except PluginError as error:
                found[name] = f"cannot be used: {error}"
        return found

    def _outside(self, point: EntryPoint) -> RegisteredPart:
        origin = f"{self.kind} {point.name!r} of the package {_package(point)!r}"
        with _blaming(origin):
            part = point.load()
        if not isinstance(part, RegisteredPart) or part.name != point.name:
            raise PluginError(
                f"{origin} cannot be used: its entry point {point.value!r} must load to a "
                f"vlm_cli.registry.RegisteredPart of that name, and gives {part!r}. {_REMEDY}"
            )
        of_part = {f.name: getattr(part, f.name) for f in dataclasses.fields(RegisteredPart)}
        return _OutsidePart(**of_part, origin=origin, methods=self.methods, settings=self.settings)

    def unknown(self, name: str) -> str:
        """Return the error message for an unknown name."""
        return (
            f"unknown {self.kind} {name!r}.{suggest(name, self)} "
            f"Known: {', '.join(sorted(self))}. Run `vlm list {self.kind.replace(' ', '-')}s` to see them described."
        )


def _package(point: EntryPoint) -> str:
    """Return the name of the package that an entry point belongs to."""
    return point.dist.name if point.dist is not None else point.value


#: Types of vision encoders that vlm brings beside OpenCLIP's towers. The names of such encoders begin with the type.
ENCODER_TYPES = {
    part.name: part
    for part in (
        RegisteredPart(
            "hf",
            "vlm_cli.modeling.encoders.hf:build_hf_encoder",
            "vlm_cli.composition:VisionEncoderOptions",
            "a vision model of Transformers, or the vision half of a larger model: hf:ORG/NAME, hf:DIRECTORY",
        ),
        RegisteredPart(
            "timm",
            "vlm_cli.modeling.encoders.timm:build_timm_encoder",
            "vlm_cli.composition:VisionEncoderOptions",
            "a model of timm: timm:NAME, timm:NAME.TAG",
        ),
        RegisteredPart(
            "several",
            "vlm_cli.modeling.encoders.several:SeveralEncoders",
            "vlm_cli.composition:SeveralEncoderOptions",
            "several encoders whose channels are concatenated: a list of names",
        ),
    )
}


def encoder_type(name: str) -> RegisteredPart:
    """Return the part that `type` in a `vision_config` names: one that vlm brings, or one of another package."""
    return ENCODER_TYPES[name] if name in ENCODER_TYPES else VISION_ENCODERS[name]


#: Vision encoders of other packages only: OpenCLIP's names are valid without an entry.
VISION_ENCODERS = Registry(
    "vision encoder",
    "vlm_cli.vision_encoders",
    methods=("configure", "patch_features"),
    settings=("name", "pretrained", "layer", "image_size"),
)
VISION_TOKENIZERS = Registry(
    "vision tokenizer", "vlm_cli.vision_tokenizers", methods=("num_tokens", "token_mask"), settings=("dim_out",)
)
FUSIONS = Registry("fusion", "vlm_cli.fusions", methods=("media_width", "project_media"))
TILINGS = Registry("tiling", "vlm_cli.tilings", settings=("picture_text",))

_TOKENIZERS = "vlm_cli.modeling.vision_tokenizers"
for _part in (
    RegisteredPart(
        "perceiver",
        f"{_TOKENIZERS}.perceiver:PerceiverResampler",
        "vlm_cli.composition:PerceiverOptions",
        "Perceiver Resampler: a few learned latents read all patches and frames (Flamingo)",
    ),
    RegisteredPart(
        "qformer",
        f"{_TOKENIZERS}.qformer:QFormer",
        "vlm_cli.composition:QFormerOptions",
        "Q-Former: learned queries in a BERT that cross-attends to the patches (BLIP-2)",
    ),
    RegisteredPart(
        "linear",
        f"{_TOKENIZERS}.linear:LinearProjection",
        "vlm_cli.composition:LinearOptions",
        "one linear map of each patch (LLaVA)",
    ),
    RegisteredPart(
        "mlp",
        f"{_TOKENIZERS}.linear:MLPProjection",
        "vlm_cli.composition:MLPOptions",
        "two linear maps with a GELU between, for each patch (LLaVA-1.5)",
    ),
    RegisteredPart(
        "c-abstractor",
        f"{_TOKENIZERS}.c_abstractor:CAbstractor",
        "vlm_cli.composition:CAbstractorOptions",
        "convolutions around a pooling to fewer patches, for each frame (Honeybee)",
    ),
    RegisteredPart(
        "latent-attention",
        f"{_TOKENIZERS}.latent_attention:LatentAttention",
        "vlm_cli.composition:LatentAttentionOptions",
        "a few learned latents attend once to the mapped patches (Kosmos-2)",
    ),
):
    VISION_TOKENIZERS.add(_part)

for _part in (
    RegisteredPart(
        "cross-attention",
        "vlm_cli.modeling.fusion.cross_attention:VLMWithCrossAttention",
        "vlm_cli.composition:CrossAttentionOptions",
        "gated cross-attention blocks before decoder layers read the vision tokens (Flamingo)",
    ),
    RegisteredPart(
        "llama-cross-attention",
        "vlm_cli.modeling.fusion.llama_cross_attention:VLMWithLlamaCrossAttention",
        "vlm_cli.composition:LlamaCrossAttentionOptions",
        "gated cross-attention blocks made like Llama's layers, with RMSNorm and SwiGLU (IDEFICS)",
    ),
    RegisteredPart(
        "language-stream",
        "vlm_cli.modeling.fusion.language_stream:VLMWithLanguageStream",
        "vlm_cli.composition:LanguageStreamOptions",
        "vision tokens take the place of the media token among the text tokens (Kosmos, BLIP-2, LLaVA)",
    ),
):
    FUSIONS.add(_part)

for _part in (
    RegisteredPart(
        "none",
        "vlm_cli.tiling.none:plan",
        "vlm_cli.composition:TilingOptions",
        "each picture is one view",
    ),
    RegisteredPart(
        "grid",
        "vlm_cli.tiling.grid:plan",
        "vlm_cli.composition:GridOptions",
        "the grid of tiles whose shape is nearest to the picture's, and the whole picture (InternVL)",
    ),
    RegisteredPart(
        "anyres",
        "vlm_cli.tiling.anyres:plan",
        "vlm_cli.composition:AnyresOptions",
        "one of several canvases with bars, cut into tiles, and the whole picture (LLaVA-NeXT)",
    ),
    RegisteredPart(
        "split",
        "vlm_cli.tiling.split:plan",
        "vlm_cli.composition:SplitOptions",
        "the picture resized to whole tiles, and the whole picture (Idefics3, SmolVLM, nanoVLM)",
    ),
):
    TILINGS.add(_part)
