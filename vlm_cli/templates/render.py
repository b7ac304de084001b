"""Render the chat template of a model with limits on time, memory and output.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and from Python, but not from
endless loops or from texts of gigabytes, and Python cannot interrupt one long operation such as `10 ** 10 ** 9`. So the
template runs in a process of its own: the system limits the memory of that process, and vlm ends it after some seconds.
The process starts in about 0.1 seconds, since it imports neither torch nor Transformers, and it stays for the prompts
that follow: a file has thousands of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_cli.errors import ChatTemplateError, EndlessTemplateError

__all__ = ["render_template"]

SECONDS = 10  # after which the process ends; a template takes milliseconds
MEMORY = 512 << 20  # bytes of address space of the process
CHARACTERS = 1_000_000  # that a template may write beyond four times what it reads

#: The first words of the process: it finds modules where this process does, and not in the working directory.
_START = "import sys; sys.path[:] = {path!r}; from vlm_cli.templates.process import main; main()"


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    *,
    opens_answer: bool = True,
) -> str:
    """Write a conversation as text.

    Args:
        template: a Jinja program.
        messages: mappings with `role` and `content`.
        special_tokens: names and texts of the tokenizer's special tokens, such as `bos_token`.
        opens_answer: go on to where the model's answer begins.

    Raises:
        ChatTemplateError: if the template fails, or exceeds its limits.
        EndlessTemplateError: if it exceeds its time.
    """
    context = {
        "messages": list(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": opens_answer,
        **{name: _plain(token) for name, token in special_tokens.items()},
    }
    request = {
        "template": template,
        "context": context,
        "seconds": SECONDS,
        "bytes": MEMORY,
        "characters": CHARACTERS + 4 * len(json.dumps(context)),
    }
    answer = _process.run(json.dumps(request).encode())
    if "text" not in answer:
        kind = EndlessTemplateError if answer.get("is_late") else ChatTemplateError
        said = answer["error"].rstrip(".")
        raise kind(f"the tokenizer's chat template cannot write this conversation: {said}.")
    text: str = answer["text"]
    return text


def _plain(value: Any) -> Any:
    """Return a token, or a list of tokens, as plain text."""
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else str(value)


class _TemplateProcess:
    """The process that renders templates. It starts at the first one, and ends with this process."""

    def __init__(self) -> None:
        self.running: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def run(self, request: bytes) -> dict[str, Any]:
        """Let the process answer a request; an error in words if it does not, and the next request starts another."""
        with self.lock:
            lines: list[bytes] = []
            reader = threading.Thread(target=lambda: lines.append(self._ask(request)), daemon=True)
            reader.start()
            reader.join(SECONDS)
            if reader.is_alive():
                self._end()
                return {"error": f"it takes more than {SECONDS} seconds", "is_late": True}
            try:
                answer: dict[str, Any] = json.loads(lines[0])
                return answer
            except (IndexError, ValueError):
                self._end()
                return {
                    "error": f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB of memory",
                    "is_late": True,
                }

    def _ask(self, request: bytes) -> bytes:
        if self.running is None:
            command = [sys.executable, "-c", _START.format(path=sys.path)]
            # Of a group of its own, so that Ctrl-C on the terminal reaches only this process.
            self.running = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        assert self.running.stdin is not None and self.running.stdout is not None
        with contextlib.suppress(OSError):  # the process has ended: it answers nothing
            self.running.stdin.write(request + b"\n")
            self.running.stdin.flush()
        return self.running.stdout.readline()

    def _end(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()
            self.running = None


_process = _TemplateProcess()


def _leave_to_parent() -> None:
    """Start another process in a copy of this one, such as a worker that loads data: a pipe serves one of them."""
    global _process
    _process = _TemplateProcess()


if hasattr(os, "register_at_fork"):  # not on Windows, which copies no process
    os.register_at_fork(after_in_child=_leave_to_parent)
