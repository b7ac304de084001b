"""The class of every command: help under headings, and old spellings of renamed options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typer.core import TyperCommand

from vlm_cli.cli import console

__all__ = ["Command", "accept_old_names"]


class Command(TyperCommand):
    """A command whose help groups the options under their headings (`rich_help_panel`)."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the options without a heading, and then each heading with its options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:  # None: the option is hidden
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = getattr(parameter, "rich_help_panel", None) or default
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace old names of options by the new ones, and tell the user about each."""
        return super().parse_args(ctx, _replace_old_names(args, getattr(self.callback, "old_names", {})))


def accept_old_names(command: Callable[..., Any], old_names: Mapping[str, str]) -> None:
    """Let a command accept options under old names; using one prints a note on stderr.

    Args:
        command: the function of the command.
        old_names: old name -> new name, both with their dashes.
    """
    command.old_names = {**getattr(command, "old_names", {}), **old_names}  # type: ignore[attr-defined]


def _replace_old_names(args: list[str], old_names: Mapping[str, str]) -> list[str]:
    """
    >>> _replace_old_names(["--max", "7", "--", "--max"], {})
    ['--max', '7', '--', '--max']
    """
    options = args.index("--") if "--" in args else len(args)  # what follows `--` is no option
    replaced = list(args)
    for i, argument in enumerate(args[:options]):
        name, equals, value = argument.partition("=")
        if name in old_names:
            console.notify(f"Note: {name} is now called {old_names[name]}.")
            replaced[i] = old_names[name] + equals + value
    return replaced
