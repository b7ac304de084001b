"""Render the chat template of a model with limits on time, memory and output.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and from Python, but not from
endless loops or from texts of gigabytes, and Python cannot interrupt one long operation such as `10 ** 10 ** 9`. So the
template runs in a process of its own: the system limits the memory of that process, and vlm ends it after some seconds.
The process starts in about 0.1 seconds, since it imports neither torch nor Transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_cli.errors import LanguageModelError

__all__ = ["render_template"]

SECONDS = 10  # after which the process ends; a template takes milliseconds
MEMORY = 512 << 20  # bytes of address space of the process
CHARACTERS = 1_000_000  # that a template may write beyond four times what it reads

#: The first words of the process: it finds modules where this process does, and not in the working directory.
_START = "import sys; sys.path[:] = {path!r}; from vlm_cli.templates.process import main; main()"


def render_template(template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, Any]) -> str:
    """Write a conversation as text, up to where the model's answer begins.

    Args:
        template: a Jinja program.
        messages: mappings with `role` and `content`.
        special_tokens: names and texts of the tokenizer's special tokens, such as `bos_token`.

    Raises:
        LanguageModelError: if the template fails, or exceeds its limits.
    """
    context = {
        "messages": list(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **{name: _plain(token) for name, token in special_tokens.items()},
    }
    request = {
        "template": template,
        "context": context,
        "seconds": SECONDS,
        "bytes": MEMORY,
        "characters": CHARACTERS + 4 * len(json.dumps(context)),
    }
    answer = _run(json.dumps(request).encode())
    if "text" not in answer:
        raise LanguageModelError(f"the tokenizer's chat template cannot write this conversation: {answer['error']}.")
    text: str = answer["text"]
    return text


def _plain(value: Any) -> Any:
    """Return a token, or a list of tokens, as plain text."""
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else str(value)


def _run(request: bytes) -> dict[str, Any]:
    """Run the process, and return what it answers; an error in words if it does not."""
    command = [sys.executable, "-c", _START.format(path=sys.path)]
    try:
        # Of a group of its own, so that Ctrl-C on the terminal reaches only this process.
        done = subprocess.run(
            command, input=request, capture_output=True, timeout=SECONDS, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it takes more than {SECONDS} seconds"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    except ValueError:
        return {"error": f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB of memory"}
