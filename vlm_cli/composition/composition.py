"""A composition: which part stands in each of the four places, its settings, and what trains.

Plain data without torch. A user gives it as YAML, JSON or flags; vlm compares it, prints it and writes it back.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vlm_cli.composition.families import FAMILIES
from vlm_cli.composition.files import merge, parse_overrides, split_name
from vlm_cli.composition.options import (
    MEDIA_TOKEN,
    PARTS,
    LanguageModelOptions,
    SeveralEncoderOptions,
    VisionEncoderOptions,
)
from vlm_cli.composition.tiling import TilingOptions
from vlm_cli.errors import CompositionError
from vlm_cli.registry import FUSIONS, TILINGS, VISION_ENCODERS, VISION_TOKENIZERS, Registry, nearest, suggest
from vlm_cli.schema import is_finite, number, show

__all__ = ["MAX_WEIGHT_DECAY", "UNTILED", "Choice", "Composition", "read_tiling"]

MAX_WEIGHT_DECAY = 1_000.0
_MOST_NAMES = 1_000  # of added tokens
_MOST_VALUES = 1_000  # of a setting that is a list

#: Annotation of a setting that is a list -> what it must be, in words.
_LISTS = {
    tuple[tuple[int, ...], ...]: "a list of lists of whole numbers, such as [[336, 672], [672, 336]]",
    tuple[int, ...]: "a list of whole numbers, such as [-2, -5]",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One chosen part: its registered name and its settings."""

    type: str
    options: Any

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **_as_plain_data(self.options)}

    def to_brief_dict(self) -> dict[str, Any]:
        """Return the part as plain data, without the rare settings that have their defaults."""
        rare = [f for f in dataclasses.fields(self.options) if "rare" in f.metadata]
        left_out = {f.name for f in rare if getattr(self.options, f.name) == f.default}
        return {key: x for key, x in self.to_dict().items() if key not in left_out}


def _encoder_as_plain_data(options: VisionEncoderOptions) -> Any:
    """Return the settings of a vision encoder, or a list of those of several."""
    if isinstance(options, SeveralEncoderOptions):
        return [_as_plain_data(x) for x in options.encoders]
    return _as_plain_data(options)


def _as_plain_data(options: Any) -> dict[str, Any]:
    """Return a part's settings with lists for tuples."""
    settings = dataclasses.asdict(options).items()
    return {key: _with_lists(x) if isinstance(x, tuple) else x for key, x in settings}


def _with_lists(values: tuple[Any, ...]) -> list[Any]:
    """Write tuples as files hold them."""
    return [_with_lists(x) if isinstance(x, tuple) else x for x in values]


#: The tiling of a composition that names none.
UNTILED = Choice(type="none", options=TilingOptions())


def read_tiling(data: Any) -> Choice:
    """Read the section `tiling` alone, as the file of an image processor holds it; None is `none`.

    Raises:
        CompositionError: with all problems.
    """
    reader = _CompositionReader({"tiling": data})
    tiling = UNTILED if data is None else reader.read_choice("tiling", TILINGS)
    if reader.problems:
        raise CompositionError(reader.problems)
    return tiling


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One choice for each of the four parts, the added tokens, and what trains.

    `Composition.compose` makes one from a family and your changes; `vlm_cli.plan` or `vlm_cli.build` turns it into a
    model:

        composition = Composition.compose("flamingo", {"language_model": "./my-llama"})
    """

    family: str | None = None
    vision_encoder: VisionEncoderOptions
    vision_tokenizer: Choice
    fusion: Choice
    language_model: LanguageModelOptions
    added_tokens: tuple[str, ...] = (MEDIA_TOKEN,)
    trainable: tuple[str, ...] = ("vision_tokenizer", "fusion", "added_tokens")
    weight_decay: float = 0.0
    weight_decay_on: tuple[str, ...] = PARTS
    tiling: Choice = UNTILED  # how the image processor cuts a picture into views

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Composition:
        """Read the plain data that `to_dict` writes, or a composition file holds.

        Raises:
            CompositionError: with all problems of the data at once.
        """
        return _CompositionReader(data).read_composition()

    @classmethod
    def compose(
        cls,
        family: str | None = None,
        *layers: Mapping[str, Any],
        overrides: Sequence[str] = (),
    ) -> Composition:
        """Cover a family's composition with each of `layers`, then with the overrides.

        Args:
            family: name of a family; None takes the last family that a layer names, or starts from nothing.
            layers: plain data, such as {"fusion": {"type": "cross-attention", "every": 4}}; later layers win.
            overrides: texts like "vision_tokenizer.num_latents=32".

        Raises:
            CompositionError: with all problems at once, an unknown family included.
        """
        problems: list[str] = []
        layers = (*layers, *parse_overrides(overrides, problems))
        chosen = family or next((x["family"] for x in reversed(layers) if x.get("family")), None)
        is_known = chosen is None or (isinstance(chosen, str) and chosen in FAMILIES)
        if not is_known:
            problems.append(f"unknown family {chosen!r}.{suggest(str(chosen), FAMILIES)} Known: {', '.join(FAMILIES)}.")
        merged = FAMILIES[chosen] if chosen and is_known else {}
        for layer in layers:
            merged = merge(merged, layer)
        return _CompositionReader({**merged, "family": chosen}, problems, is_whole=is_known).read_composition()

    def to_dict(self) -> dict[str, Any]:
        """Return the composition as plain data, which `from_dict` reads back."""
        # Directories of earlier versions have no tiling; what they hold stays equal.
        tiling = {} if self.tiling == UNTILED else {"tiling": self.tiling.to_dict()}
        return {
            "family": self.family,
            "vision_encoder": _encoder_as_plain_data(self.vision_encoder),
            "vision_tokenizer": self.vision_tokenizer.to_dict(),
            "fusion": self.fusion.to_dict(),
            **tiling,
            "language_model": dataclasses.asdict(self.language_model),
            "added_tokens": list(self.added_tokens),
            "trainable": list(self.trainable),
            "weight_decay": self.weight_decay,
            "weight_decay_on": list(self.weight_decay_on),
        }


@dataclass
class _CompositionReader:
    """Turns plain data into a composition. It collects all problems instead of stopping at the first.

    Args:
        data: the composition.
        problems: problems that the caller found before.
        is_whole: whether an absent part is a problem.
    """

    data: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    is_whole: bool = True

    def read_composition(self) -> Composition:
        """Read all parts.

        Raises:
            CompositionError: with all problems, and with the settings of the parts that could be read.
        """
        fields = [f.name for f in dataclasses.fields(Composition)]
        self.problems += [
            f"unknown key {show(key)}.{suggest(str(key), fields) or self.find_part_of(str(key))} "
            f"Known: {', '.join(fields)}."
            for key in self.data
            if key not in fields
        ]
        vision_encoder = self.read_vision_encoder()
        language_model = self.read_options("language_model", LanguageModelOptions, self.read_settings("language_model"))
        for name, part in (("vision_encoder", vision_encoder), ("language_model", language_model)):
            if part is not None and not part.name and self.is_whole:
                flag = name.replace("_", "-")
                self.problems.append(f"no {name.replace('_', ' ')} is named. Add --{flag}, or {name}.name.")
        vision_tokenizer = self.read_choice("vision_tokenizer", VISION_TOKENIZERS)
        fusion = self.read_choice("fusion", FUSIONS)
        tiling = self.read_choice("tiling", TILINGS) if self.data.get("tiling") is not None else UNTILED
        added_tokens = self.read_names("added_tokens", (MEDIA_TOKEN,))
        if MEDIA_TOKEN not in added_tokens:
            self.problems.append(f"added_tokens must hold {MEDIA_TOKEN!r}, got {show(added_tokens)}.")
        trainable = self.read_names("trainable", ("vision_tokenizer", "fusion", "added_tokens"), PARTS)
        weight_decay = self.read_weight_decay()
        weight_decay_on = self.read_names("weight_decay_on", PARTS, PARTS)
        if self.problems:
            readable = {"vision_encoder": vision_encoder or self.read_encoder_name(), "language_model": language_model}
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
            tiling=tiling,
        )

    def find_part_of(self, key: str) -> str:
        """Return " Did you mean …?" for a setting that lacks its part, such as num_latents; "" if no part has it."""
        classes: dict[str, Any] = {"vision_encoder": VisionEncoderOptions, "language_model": LanguageModelOptions}
        for part, registry in (("vision_tokenizer", VISION_TOKENIZERS), ("fusion", FUSIONS), ("tiling", TILINGS)):
            value = self.data.get(part)
            chosen = value.get("type") if isinstance(value, Mapping) else value
            if isinstance(chosen, str) and chosen in registry:
                classes[part] = registry[chosen].options_class()
        settings = {part: get_type_hints(options) for part, options in classes.items()}
        near = nearest(key, [name for names in settings.values() for name in names])
        meant = [f"{part}.{near}" for part, names in settings.items() if near in names]
        return f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""

    def read_settings(self, part: str) -> Any:
        """Read the settings of the vision encoder or the language model. A bare string is the part's name."""
        value = self.data.get(part) or {}
        return {"name": value} if isinstance(value, str) else value

    def read_vision_encoder(self) -> Any:
        """Read the vision encoder into the dataclass of its name, or a list of several; None if there is a problem."""
        value = self.read_settings("vision_encoder")
        if not isinstance(value, list):
            return self.read_one_encoder("vision_encoder", value)
        found = [
            self.read_one_encoder(f"vision_encoder[{i}]", {"name": x} if isinstance(x, str) else x)
            for i, x in enumerate(value)
        ]
        if any(x is None for x in found):
            return None
        if unnamed := [i for i, x in enumerate(found) if not x.name]:
            self.problems.append(f"vision_encoder[{unnamed[0]}] has no name.")
            return None
        try:
            return SeveralEncoderOptions(encoders=tuple(found))
        except CompositionError as error:
            self.problems += [f"vision_encoder: {problem}" for problem in error.problems]
            return None

    def read_one_encoder(self, place: str, value: Any) -> Any:
        """Read one vision encoder; None if there is a problem."""
        name = value.get("name") if isinstance(value, Mapping) else None
        if isinstance(name, str) and value.get("pretrained") is None:
            value = {**value, **split_name(name)}
            name = value["name"]
        options: Any = VisionEncoderOptions
        if isinstance(name, str) and name in VISION_ENCODERS:
            options = VISION_ENCODERS[name].options_class()
        return self.read_options(place, options, value)

    def read_encoder_name(self) -> VisionEncoderOptions | None:
        """Read the name alone of a vision encoder whose settings do not fit.

        They may be settings of a package that is not installed. The name lets the caller report that too.
        """
        value = self.read_settings("vision_encoder")
        name = value.get("name") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name in VISION_ENCODERS:
            return None
        return VisionEncoderOptions(name=split_name(name)["name"] or "")

    def read_choice(self, name: str, registry: Registry) -> Any:
        """Read the part that `name` stands for, of one of the registry's types; None if there is a problem."""
        value = self.data.get(name)
        value = {"type": value} if isinstance(value, str) else value
        given = value.get("type") if isinstance(value, Mapping) else value
        if given is not None and not (isinstance(given, str) and isinstance(value, Mapping)):
            place = f"{name}.type" if isinstance(value, Mapping) else name
            self.problems.append(f"{place} must be a name ({', '.join(registry)}), got {show(given)}.")
            return None
        if not isinstance(value, Mapping) or given is None:
            has_flag = name != "tiling"
            flag = (
                f"--family ({', '.join(FAMILIES)}) or --{name.replace('_', '-')}"
                if has_flag
                else f"a type, for example --set {name}.type=grid"
            )
            if self.is_whole:
                self.problems.append(f"no {registry.kind} is chosen. Add {flag} ({', '.join(registry)}).")
            return None
        if value["type"] not in registry:
            self.problems.append(registry.unknown(value["type"]))
            return None
        settings = {key: x for key, x in value.items() if key != "type"}
        options = self.read_options(name, registry[value["type"]].options_class(), settings)
        return Choice(type=value["type"], options=options)

    def read_options(self, place: str, options: type, settings: Any) -> Any:
        """Make the dataclass `options` of a part's settings; None if there is a problem."""
        if not isinstance(settings, Mapping):
            self.problems.append(f"{place} must be a name or a mapping, got {show(settings)}.")
            return None
        hints = get_type_hints(options)
        found = len(self.problems)
        for key, value in settings.items():
            if key not in hints:
                known = ", ".join(hints) or "none"
                self.problems.append(f"unknown key {place}.{str(key)[:60]}.{suggest(str(key), hints)} Known: {known}.")
            elif problem := _type_problem(hints[key], value):
                self.problems.append(f"{place}.{key} must be {problem}, got {show(value)}.")
        if len(self.problems) > found:
            return None
        try:
            return options(**settings)
        except CompositionError as error:
            self.problems += [f"{place}.{problem}" for problem in error.problems]
            return None

    def read_names(self, key: str, default: tuple[str, ...], known: Iterable[str] = ()) -> tuple[str, ...]:
        """Read a list of names; a bare string is a list of one. If `known` is not empty, all must be in it."""
        value = self.data.get(key, default)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
            self.problems.append(f"{key} must be a list of names, got {show(value)}.")
            return default
        known = list(known)
        self.problems += [
            f"unknown part {show(x)} in {key}.{suggest(x, known)} Known: {', '.join(known)}."
            for x in value
            if known and x not in known
        ]
        if len(set(value)) < len(value):
            self.problems.append(f"{key} names something twice: {show(value)}.")
        if not all(value):
            self.problems.append(f"{key} holds an empty name: {show(value)}. Leave it out.")
        if len(value) > _MOST_NAMES:
            self.problems.append(f"{key} holds {len(value):,} names; {_MOST_NAMES:,} are possible.")
        return tuple(value)

    def read_weight_decay(self) -> float:
        """Read the weight decay."""
        value = self.data.get("weight_decay", 0.0)
        kind = number(0, MAX_WEIGHT_DECAY)
        if not kind.fits(value):
            self.problems.append(f"weight_decay must be {kind.words}, got {show(value)}.")
            return 0.0
        return float(value)


def _type_problem(hint: Any, value: Any) -> str | None:
    """Say in words what a value had to be; None if the value fits its annotation.

    >>> _type_problem(int | None, "x")
    'a whole number or null'
    """
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(hint) in (types.UnionType, typing.Union):
        inner = [x for x in get_args(hint) if x is not type(None)]
        if (value is None and type(None) in get_args(hint)) or any(_type_problem(x, value) is None for x in inner):
            return None
        null = ["null"] if type(None) in get_args(hint) else []
        return " or ".join([*(_type_problem(x, value) or "" for x in inner), *null])
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:  # of any length, whose values are all of one kind
        inner, is_list = get_args(hint)[0], isinstance(value, (list, tuple))
        fits = is_list and len(value) <= _MOST_VALUES and all(_type_problem(inner, x) is None for x in value)
        return None if fits else _LISTS.get(hint, "a list")
    # A bool is an int in Python, but `depth: true` is a mistake.
    accepts = (int, float) if hint is float else hint
    fits = isinstance(value, accepts) and (hint is bool or not isinstance(value, bool))
    if fits and hint is float and not is_finite(value):
        return "a finite number"
    return None if fits else words[hint]
