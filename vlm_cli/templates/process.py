"""Render a chat template in a process of its own, which `vlm_cli.templates.render` starts and may end.

The process imports Jinja and the standard library only. Each line that it reads on stdin is a JSON object with
`template`, `context` and limits, and for each it writes one on stdout: `text`, or `error` in words.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

__all__ = ["main"]


def main() -> None:
    """Render what each line of stdin asks for, within the limits that the line sets."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(request: dict[str, Any]) -> dict[str, str]:
    _limit(request["seconds"], request["bytes"])
    try:
        text = _render(request["template"], request["context"], request["characters"])
        return {"text": text}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except MemoryError:
        return {"error": f"it needs more than {request['bytes'] >> 20:,} MB of memory"}
    except Exception as error:  # a template is a program, and may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def _limit(seconds: int, size: int) -> None:
    """Let the system end the process when it uses so many more seconds of a processor, or so many bytes of memory."""
    try:
        import resource
    except ImportError:  # Windows: the parent still measures the time
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds += math.ceil(usage.ru_utime + usage.ru_stime)
    for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size)):
        _, hard = resource.getrlimit(limit)
        try:
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        except (OSError, ValueError):  # macOS does not limit the address space
            continue


def _render(template: str, context: dict[str, Any], most: int) -> str:
    """Render a template, and stop when it has written more than `most` characters.

    Raises:
        Exception: whatever the template raises.
    """
    pieces, length = [], 0
    for piece in _compile(template).generate(**context):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise _TooLong(f"it writes more than {most:,} characters")
    return "".join(pieces)


class _TooLong(Exception):
    """A template that writes without end."""


@lru_cache(maxsize=4)
def _compile(template: str) -> Any:
    """Compile a template once: that takes longer than to render it, and a file asks for the same one at each turn."""
    return _environment().from_string(template)


def _environment() -> Any:
    """Make the environment in which Transformers renders chat templates; a test compares the two."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}`, which marks for training what the assistant wrote."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")

    class Dictionary:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment
