"""The classes of `vlm` and of every command: their help, and options made from settings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from vlm_cli.cli import console
from vlm_cli.cli.completion import complete_parts, offer
from vlm_cli.cli.spellings import replace_names
from vlm_cli.flags import Setting, parse_numbers
from vlm_cli.plain_data import parse_json, parse_yaml
from vlm_cli.schema import show

__all__ = ["Command", "Group", "make_option", "option"]

#: Stands for a hyphen while a help is wrapped, so that no line ends inside `--max-steps`.
_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class _HelpInWholeWords:
    """Writes a help in which lines end at spaces only, and in which an example can be pasted."""

    def get_help(self, ctx: Any) -> str:
        formatter = ctx.make_formatter()
        write_text, write_list = formatter.write_text, formatter.write_dl

        def write_whole(text: str) -> None:
            paragraphs = text.split("\n\n")
            if paragraphs[-1].startswith("Example: "):
                columns = formatter.width - formatter.current_indent - len(" \\")
                paragraphs[-1] = "\b\n" + _wrap_example(" ".join(paragraphs[-1].split()), columns)
            write_text("\n\n".join(paragraphs).replace("-", _HYPHEN))

        def write_whole_list(rows: Any, *args: Any, **keywords: Any) -> None:
            write_list([(a.replace("-", _HYPHEN), b.replace("-", _HYPHEN)) for a, b in rows], *args, **keywords)

        formatter.write_text, formatter.write_dl = write_whole, write_whole_list
        self.format_help(ctx, formatter)  # type: ignore[attr-defined]
        text: str = formatter.getvalue().rstrip("\n")
        return text.replace(_HYPHEN, "-")


def _wrap_example(text: str, columns: int) -> str:
    """Wrap a command between its words; each line but the last ends as the shell wants it.

    >>> print(_wrap_example('Example: vlm chat "a b" --json', 20))
    Example: vlm chat \\
        "a b" --json
    """
    lines = [""]
    for word in re.findall(r'(?:"[^"]*"|\S)+', text):
        joined = f"{lines[-1]} {word}" if lines[-1].strip() else f"{lines[-1]}{word}"
        if len(joined) > columns and lines[-1].strip():
            lines.append(f"    {word}")
        else:
            lines[-1] = joined
    return " \\\n".join(lines)


class Group(_HelpInWholeWords, TyperGroup):
    """The command `vlm`, whose help gives the first sentence of each command, whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(x.help or "")) for name, x in commands.items() if x is not None])


def _first_sentence(text: str) -> str:
    """Return the first sentence of a help.

    >>> _first_sentence("Answer. Only the new text goes to stdout.")
    'Answer.'
    """
    return re.split(r"(?<=\.)\s", text.strip(), maxsplit=1)[0]


class Command(_HelpInWholeWords, TyperCommand):
    """A command whose help groups the options under their headings (`rich_help_panel`).

    Ranges name the value as the option does: `--top-k K … [K>=1]`, where Typer would write `x>=1`.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the options without a heading, and then each heading with its options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue  # a hidden option
            default = "Options"
            if parameter.param_type_name == "argument":
                # Typer writes `MODEL <str>`; the Python type says nothing to the user.
                default, record = "Arguments", (record[0].split(" <")[0], record[1])
            if parameter.metavar and parameter.metavar.isupper():
                record = (record[0], re.sub(r"\bx(?=[<>]=)|(?<=<=)x\b", parameter.metavar, record[1]))
            heading = getattr(parameter, "rich_help_panel", None) or default
            sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace other names of options by the options' own."""
        args, aliases = replace_names(args, self.callback, ctx.fail)
        given = list(args)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:  # the shell completes a word
            self._check_repeats(ctx, given, aliases)
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):  # a range alone lets NaN through
                ctx.fail(f"Invalid value for '{parameter.opts[0]}': {value} is no finite number.")
        return rest

    def _check_repeats(self, ctx: Any, args: list[str], aliases: Mapping[str, str]) -> None:
        """Tell of options that are given twice and take one value: the last counts, and a file is never left out.

        Two names of one option are an error, since one of them would be overlooked.
        """
        _, _, order = self.make_parser(ctx).parse_args(args)
        counts: Counter[Any] = Counter(order)
        for parameter, count in counts.items():
            for name in (x for x in parameter.opts if count > 1 and x in aliases):
                ctx.fail(f"{name} and {aliases[name]} are two names of one option. Give one of them.")
            if count < 2 or parameter.param_type_name != "option" or parameter.multiple or parameter.is_flag:
                continue
            name, value = parameter.opts[0], ctx.params.get(parameter.name)
            if name in _INPUTS:
                join = " To use several files of records, join them: cat A B > ALL" if "data" in name else ""
                ctx.fail(f"{name} is given {count} times and takes one value; the last is {str(value)!r}.{join}")
            console.notify(f"Note: {name} is given {count} times; the last counts, {value!r}.")


#: Options that name what a command reads.
_INPUTS = ("--data", "--eval-data", "--prompt-file", "--media-root")


def option(heading: str, help: str, *names: str, **settings: Any) -> Any:
    """Describe an option for Typer.

    Args:
        heading: of the help, under which the option stands.
        help: what the value sets.
        names: the option's names, if they are not the parameter's name with dashes.
        settings: other arguments of `typer.Option`.
    """
    return typer.Option(*names, help=help, rich_help_panel=heading, **settings)


def make_option(setting: Setting) -> Any:
    """Make the annotation of a command's parameter, which Typer reads, from a setting.

    A setting that lists its choices takes a text, so that the settings class says what is wrong with it.
    """
    flag, kind = setting.flag, setting.type
    # Typer gives an option that is off without a name of its own a second one, `--no-…`.
    names = [setting.spelling] if kind is not bool or not setting.default else []
    names += [flag.short] if flag.short is not None else []
    keywords: dict[str, Any] = {"help": flag.help, "rich_help_panel": flag.heading, "metavar": flag.metavar}
    if setting.choices:
        kind, keywords["metavar"] = str, flag.metavar or "|".join(setting.choices)
        keywords["autocompletion"] = offer(lambda: setting.choices)
    elif flag.per:
        kind, keywords["parser"] = str, partial(_read_numbers, setting)
    elif get_origin(kind) is Mapping:
        kind, keywords["parser"] = str, partial(_read_settings, setting)
    elif flag.repeated:
        kind = list[str]
        keywords["autocompletion"] = complete_parts  # --lora begins with a part
    elif get_origin(kind) is tuple:
        kind, keywords["parser"] = str, _split_names
        keywords["autocompletion"] = offer(lambda: flag.items) if flag.items else complete_parts
    optional = kind | None if setting.default is None else kind
    return Annotated[optional, typer.Option(*names, **keywords)]


def _read_numbers(setting: Setting, given: Any) -> Any:
    """Read the value of a setting that is one number or numbers with names; a default is no text."""
    try:
        return parse_numbers(given, setting) if isinstance(given, str) else given
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read_settings(setting: Setting, text: str) -> dict[str, Any]:
    """Read values with names: NAME=X,NAME=X or, as Transformers writes them, a JSON object.

    Raises:
        BadParameter: if the text is neither.
    """
    data: Any = None
    try:
        if text.lstrip().startswith("{"):
            data = parse_json(text)
        else:
            pairs = [entry.partition("=") for entry in text.split(",")]
            data = {name.strip(): parse_yaml(x) for name, equals, x in pairs if equals and name.strip()}
            data = data if len(data) == len(pairs) else None
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise typer.BadParameter(
            f"{setting.spelling} expects {setting.flag.metavar} or a JSON object, got {show(text)}."
        )
    return data


def _split_names(text: str) -> tuple[str, ...]:
    """Split the names that a user separates by commas.

    >>> _split_names("vision-tokenizer, fusion")
    ('vision_tokenizer', 'fusion')
    """
    return tuple(name for part in text.split(",") if (name := part.strip().replace("-", "_")))
