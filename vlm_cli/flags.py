"""Describe a setting once, beside its type and default: `Annotated[float, Flag(help="Highest rate.", …)] = 1e-4`.

From this description the command line makes the setting's option, and `find_problems` checks the setting's value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vlm_cli.registry import suggest
from vlm_cli.schema import is_finite, show

__all__ = ["OTHERS", "Alias", "Flag", "Setting", "find_problems", "list_settings", "parse_numbers", "spell_settings"]

#: Stands in a value of several numbers for all that have no number of their own.
OTHERS = "others"


@dataclass(frozen=True)
class Alias:
    """Another program's name of an option, which works and does not stand in `--help`.

    Attributes:
        name: such as `--per-device-train-batch-size`.
        below: the value must be less than this.
        beside_switch: the other program has the option itself as a switch, which may stand there, too.
    """

    name: str
    below: float | None = None
    beside_switch: bool = False


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How a setting reads on the command line, and which values it may have.

    Attributes:
        help: the text in `--help`.
        heading: the heading of `--help` under which the option stands.
        metavar: what the user types after the option, such as `N` or `FILE`; of choices, their list without it.
        short: a shorter spelling, such as `-b`.
        old_names: spellings of earlier versions, which still work.
        aliases: names that other programs give this option.
        items: what may stand in a list, if the value is one.
        per: names that may have numbers of their own: the value is then one number, or a mapping with these keys and
            `others`.
        above: the value must be greater than this.
        least: the value must be at least this.
        most: the value must be at most this.
        hint: a sentence that is added when the value is none of the choices.
        repeated: the option may be given several times; the setting holds all values.
    """

    help: str
    heading: str
    metavar: str | None = None
    short: str | None = None
    old_names: tuple[str, ...] = ()
    aliases: tuple[Alias, ...] = ()
    items: tuple[str, ...] = ()
    per: tuple[str, ...] = ()
    above: float | None = None
    least: float | None = None
    most: float | None = None
    hint: str = ""
    repeated: bool = False


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass of settings."""

    name: str
    type: Any  # without `None`
    default: Any
    flag: Flag

    @property
    def spelling(self) -> str:
        """The option's name: `--max-steps` for `max_steps`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that the setting may have; empty if they are not listed."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def find_problem(self, value: Any) -> str | None:
        """Say why the setting may not have this value; None if it may."""
        if value is None:
            return None
        if self.flag.per and isinstance(value, Mapping):
            return self._find_problem_of_several(value)
        if self.flag.items:
            return self._find_problem_of_list(value)
        if self.choices:
            if value in self.choices:
                return None
            hint = f" {self.flag.hint}" if self.flag.hint else ""
            known = ", ".join(self.choices)
            return f"unknown {self.name} {value!r}.{suggest(str(value), self.choices)} Known: {known}.{hint}"
        return self._find_problem_of_number(value) if self.type in (int, float) or self.flag.per else None

    def _find_problem_of_list(self, values: Sequence[str]) -> str | None:
        known = ", ".join(self.flag.items)
        for x in values:
            if x not in self.flag.items:
                return f"unknown name {x!r} in {self.spelling}.{suggest(x, self.flag.items)} Known: {known}."
        return None if values else f"{self.spelling} names nothing. Known: {known}."

    def _find_problem_of_several(self, values: Mapping[str, Any]) -> str | None:
        if not values:
            return f"{self.spelling} names none of {', '.join(self.flag.per)}."
        for name, x in values.items():
            if name not in (*self.flag.per, OTHERS):
                known = ", ".join(self.flag.per)
                return f"{self.spelling} names {name!r}.{suggest(str(name), self.flag.per)} Known: {known}."
            if problem := self._find_problem_of_number(x):
                return f"{problem.removesuffix('.')} for {name}."
        return None

    def _find_problem_of_number(self, value: Any) -> str | None:
        flag = self.flag
        if not is_finite(value):
            return f"{self.spelling} must be a finite number, got {show(value)}."
        if flag.above is not None and not value > flag.above:
            return f"{self.spelling} must be above {flag.above:g}, got {value}."
        if flag.least is not None and not value >= flag.least:
            return f"{self.spelling} must be {flag.least:g} or more, got {value}."
        if flag.most is not None and value > flag.most:
            return f"{self.spelling} must be at most {flag.most:,}, got {show(value)}."
        return None


def list_settings(settings: Any) -> list[Setting]:
    """List the fields of a dataclass, or of one of its objects, that have a `Flag`."""
    hints = get_type_hints(settings if isinstance(settings, type) else type(settings), include_extras=True)
    found = []
    for field in dataclasses.fields(settings):
        flags = [x for x in getattr(hints[field.name], "__metadata__", ()) if isinstance(x, Flag)]
        if flags:
            found.append(Setting(field.name, _strip(hints[field.name]), field.default, flags[0]))
    return found


def find_problems(settings: Any) -> list[str]:
    """Check the value of every setting, and return one message for each that it may not have."""
    problems = (setting.find_problem(getattr(settings, setting.name)) for setting in list_settings(settings))
    return [problem for problem in problems if problem is not None]


def parse_numbers(text: str, setting: Setting) -> float | dict[str, float]:
    """Read one number, or numbers with names.

    >>> setting = Setting("rate", float, 0.1, Flag(help="Rate.", heading="Learning", per=("fusion",)))
    >>> parse_numbers("2e-5", setting)
    2e-05
    >>> parse_numbers("1e-4,fusion=1e-3", setting)
    {'others': 0.0001, 'fusion': 0.001}

    Raises:
        ValueError: saying what is wrong.
    """
    found: dict[str, float] = {}
    for entry in text.split(","):
        name, equals, number = entry.rpartition("=")
        key = name.strip().replace("-", "_") if equals else OTHERS
        if key in found:
            raise ValueError(f"{setting.spelling} gives two numbers to {key}: {text!r}.")
        try:
            found[key] = float(number)
        except ValueError:
            raise ValueError(
                f"{setting.spelling} expects a number, such as 1e-4, or numbers for parts, such as "
                f"1e-4,{setting.flag.per[0]}=1e-5, got {text!r}."
            ) from None
    return found[OTHERS] if list(found) == [OTHERS] else found


def spell_settings(settings: Any) -> list[str]:
    """Write the settings that differ from their defaults as words of a command line, which reads them back."""
    words: list[str] = []
    for setting in list_settings(settings):
        value = getattr(settings, setting.name)
        if value != setting.default:
            words += _spell(setting, value)
    return words


def _spell(setting: Setting, value: Any) -> list[str]:
    name = setting.spelling
    if isinstance(value, bool):
        return [name if value else f"--no-{name.removeprefix('--')}"]
    if setting.flag.repeated:
        return [word for x in value for word in (name, str(x))]
    if isinstance(value, Mapping):
        pairs = [f"{x}" if setting.flag.per and key == OTHERS else f"{key}={x}" for key, x in value.items()]
        return [name, ",".join(pairs)]
    if isinstance(value, tuple):
        return [name, ",".join(value) or "none"]
    return [name, str(value)]


def _strip(annotation: Any) -> Any:
    """Remove `Annotated[…]` and `| None` from a type.

    >>> _strip(Annotated[int | None, "words"])
    <class 'int'>
    """
    if get_origin(annotation) is Annotated:
        return _strip(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007
    return annotation
