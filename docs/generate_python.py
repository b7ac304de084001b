"""Write docs/python.md: the public names of `vlm_cli` with their docstrings.

A name is public if `vlm_cli.__all__` lists it. Of a class the page shows the methods that the class itself defines.

Example: python docs/generate_python.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlm_cli

PAGE = Path(__file__).with_name("python.md")
HEAD = """# Python

Every public name of `vlm_cli`, written by `docs/generate_python.py` from the docstrings. Names load on first use, so
`import vlm_cli` is quick. [usage.md](usage.md#python) shows them at work; [extending.md](extending.md) lists the names
that a plugin uses. The [glossary](glossary.md) explains words and the letters in shapes.
"""
SHOWN = ("forward", "from_pretrained", "generate")  # methods that Transformers documents, and we too
LINE = 110  # characters of a signature


def generate() -> str:
    """The page."""
    names = sorted((name for name in vlm_cli.__all__ if not name.startswith("_")), key=str.lower)
    found = {name: getattr(vlm_cli, name) for name in names}
    functions = [name for name, value in found.items() if not inspect.isclass(value)]
    classes = [name for name, value in found.items() if inspect.isclass(value)]
    lines = [HEAD]
    lines += ["| name | what it is |", "|---|---|"]
    lines += [f"| [`{name}`](#{name.lower()}) | {_first_line(found[name])} |" for name in [*functions, *classes]]
    for name in [*functions, *classes]:
        lines += ["", f"## {name}", "", *_entry(name, found[name])]
        if inspect.isclass(found[name]):
            for method, value in _methods(found[name]):
                lines += ["", f"### {name}.{method}", "", *_entry(method, value)]
    return "\n".join(lines) + "\n"


def _first_line(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "").partition("\n")[0].replace("|", "\\|")


def _methods(owner: type) -> Iterator[tuple[str, Any]]:
    """The documented methods that a class brings.

    Methods of its mixins in this package belong to it. A method that overrides another class's is left out, since that
    class documents it, unless `SHOWN` names it.
    """
    ours = [base for base in owner.__mro__ if base.__module__.startswith("vlm_cli.")]
    others = [base for base in owner.__mro__ if base not in ours]
    public = [base for base in ours[1:] if base.__name__ in vlm_cli.__all__]
    for base in ours if not public else ours[:1]:
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            function = function.fget if isinstance(function, property) else function
            is_public = not name.startswith("_") and inspect.isfunction(function) and bool(function.__doc__)
            is_new = not any(hasattr(other, name) for other in [*others, *public])
            if is_public and (is_new or (name in SHOWN and not public)):
                yield name, value


def _entry(name: str, value: Any) -> list[str]:
    """The signature and the docstring of a name."""
    function = value.fget if isinstance(value, property) else value
    lines = [] if isinstance(value, property) else ["```python", *_signature(name, value), "```", ""]
    return [*lines, *_markdown(inspect.cleandoc(inspect.unwrap(getattr(function, "__func__", function)).__doc__ or ""))]


def _signature(name: str, value: Any) -> list[str]:
    """The call of a name, one argument a line if it is long."""
    called = value.__init__ if inspect.isclass(value) else getattr(value, "__func__", value)
    own = vars(value).get("__annotations__", {}) if dataclasses.is_dataclass(value) else None
    signature = inspect.signature(called)
    arguments = []
    is_marked = False  # whether a `*` stands before the arguments that only go by name
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls") or (own is not None and parameter.name not in own):
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not is_marked:
            arguments.append("*")
        is_marked |= parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        arguments.append(_argument(parameter))
    returned = signature.return_annotation
    result = "" if inspect.isclass(value) or returned is inspect.Signature.empty else f" -> {_type(returned)}"
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= LINE:
        return [line]
    return [f"{name}(", *(f"    {argument}," for argument in arguments), f"){result}"]


def _argument(parameter: inspect.Parameter) -> str:
    """An argument with its type and its default; `…` stands for a default that is no plain value."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = "" if parameter.annotation is inspect.Parameter.empty else f": {_type(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return f"{stars}{parameter.name}{typed}"
    is_plain = isinstance(parameter.default, (str, int, float, tuple, type(None)))
    equals = " = " if typed else "="
    return f"{parameter.name}{typed}{equals}{parameter.default!r}" if is_plain else f"{parameter.name}{typed}{equals}…"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _markdown(text: str) -> list[str]:
    """A docstring as Markdown: `Args:` and the like become lists, doctests and drawings become blocks."""
    lines: list[str] = []
    for block in re.split(r"\n\n+", text):
        title = re.match(r"(Args|Returns|Raises|Attributes|Yields):\n", block)
        if title:
            lines += [f"**{title[1]}**", "", *_list(textwrap.dedent(block[title.end() :])), ""]
        elif block.startswith((">>>", "    ")):
            lines += ["```text", *textwrap.dedent(block).splitlines(), "```", ""]
        else:
            lines += [*block.splitlines(), ""]
    return lines[:-1]


def _list(text: str) -> list[str]:
    """`name: what it is`, with indented further lines, as a list; a text without names as it is."""
    lines = []
    for entry in re.split(r"\n(?=\S)", text):
        name, colon, told = entry.partition(":")
        words = " ".join(told.split())
        lines.append(f"- `{name}`: {words}" if colon and re.fullmatch(r"\*{0,2}\w+", name) else " ".join(entry.split()))
    return lines


if __name__ == "__main__":
    PAGE.write_text(generate(), encoding="utf-8")
    print(f"Wrote {PAGE}.")
