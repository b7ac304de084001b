"""Other names of a command's options: those of earlier versions, and those that other programs use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_cli.cli import console
from vlm_cli.flags import Alias

__all__ = ["accept_aliases", "accept_old_names", "replace_names"]


def accept_old_names(command: Callable[..., Any], old_names: Mapping[str, str]) -> None:
    """Let a command accept options under old names; using one prints a note on stderr.

    Args:
        command: the function of the command.
        old_names: old name -> new name, both with their dashes.
    """
    command.old_names = {**getattr(command, "old_names", {}), **old_names}  # type: ignore[attr-defined]


def accept_aliases(command: Callable[..., Any], aliases: Mapping[Alias, str]) -> None:
    """Let a command accept options under names of another program, also with `_` in the place of `-`.

    Args:
        command: the function of the command.
        aliases: alias -> name of the option, with its dashes.
    """
    command.aliases = {**getattr(command, "aliases", {}), **aliases}  # type: ignore[attr-defined]


def replace_names(args: list[str], command: Any, fail: Callable[[str], Any]) -> tuple[list[str], dict[str, str]]:
    """Replace other names of options in a command line; words after `--` are no options.

    Args:
        args: the words of the command line.
        command: the function of the command.
        fail: is called with what is wrong if an alias has a value that it cannot have.

    Returns:
        The words, and name of an option -> the alias that stood there.
    """
    args = _drop_switches(args, getattr(command, "aliases", {}))
    old_names: Mapping[str, str] = getattr(command, "old_names", {})
    aliases = {alias.name: (alias, name) for alias, name in getattr(command, "aliases", {}).items()}
    options = args.index("--") if "--" in args else len(args)
    replaced, used = list(args), {}
    for i, word in enumerate(args[:options]):
        given, equals, value = word.partition("=")
        if given in old_names:
            console.notify(f"Note: {given} is now called {old_names[given]}.")
            replaced[i] = old_names[given] + equals + value
            continue
        # Transformers writes its options with either.
        name = given.replace("_", "-") if aliases and given.startswith("--") else given
        if name in aliases:
            alias, target = aliases[name]
            if problem := _find_problem(alias, target, value if equals else "".join(args[i + 1 : i + 2])):
                fail(problem)
            name, used[target] = target, given
        replaced[i] = name + equals + value
    return replaced, used


def _drop_switches(args: list[str], aliases: Mapping[Alias, str]) -> list[str]:
    """Leave out an option that another program has as a switch, `--x` or `--x true`, where an alias gives its value."""
    options = args.index("--") if "--" in args else len(args)
    spelled = [word.partition("=")[0].replace("_", "-") for word in args[:options]]
    switches = {target for alias, target in aliases.items() if alias.beside_switch and alias.name in spelled}
    kept, i = [], 0
    while i < options:
        word, value = args[i], args[i + 1] if i + 1 < options else "--"
        if spelled[i] in switches and "=" not in word and (value.startswith("--") or value.lower() == "true"):
            i += 1 + (not value.startswith("--"))
            continue
        kept.append(word)
        i += 1
    return [*kept, *args[options:]]


def _find_problem(alias: Alias, target: str, value: str) -> str | None:
    try:
        if alias.below is None or float(value) < alias.below:
            return None
    except ValueError:
        return None  # the option itself says what is wrong
    return f"{alias.name} must be below {alias.below:g}, got {value}. For more, give {target}."
