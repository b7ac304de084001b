"""The Typer application: it joins the commands, and turns an error into a message and an exit code."""

from __future__ import annotations

import builtins
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vlm_cli import __version__
from vlm_cli.cli import (
    batch,
    build,
    chat,
    console,
    cost,
    count_params,
    data,
    diff,
    doctor,
    eval,
    export,
    generate,
    inspect,
    list_parts,
    push,
    serve,
    sweep,
    terminal,
    trace,
    train,
)
from vlm_cli.cli.command import Command, Group
from vlm_cli.cli.completion import mend_scripts
from vlm_cli.cli.standard_streams import OutputError, flush_streams, open_streams
from vlm_cli.errors import VLMError, first_line, is_out_of_memory
from vlm_cli.interrupt import Interrupted, describe_signal, end_at_signals

__all__ = ["app", "main"]

app = typer.Typer(
    name="vlm",
    help="Build, run, train, check and share vision-language models made of any vision encoder, vision tokenizer, "
    "fusion and language model.\n\n"
    'Start here: vlm generate "<image:photo.jpg>Describe the image."\n\n'
    "`vlm COMMAND --help` shows the options of a command, with an example.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

mend_scripts()

_debug = False


def _print_version(asked: bool) -> None:
    if asked:
        console.print_line(f"vlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="VLM_DEBUG")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    global _debug
    _debug = debug
    console.be_quiet(False)  # until the command's own option says otherwise


def _guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: an error prints one message on stderr, and the exit code is 2 for wrong usage, 1 for a failure,
    130 for Ctrl-C and 143 for SIGTERM."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _check_working_directory()
            with console.warnings_as_notes():
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            end = error if isinstance(error, Interrupted) else Interrupted()
            console.notify(describe_signal(end.number, str(end)))
            raise typer.Exit(128 + end.number) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None  # the reader has closed the pipe (`vlm list | head`)
        except OutputError as error:
            _report_output(error)
            raise typer.Exit(1) from None
        except VLMError as error:
            if _debug:
                raise
            console.error(str(error))
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            if _debug:
                raise
            console.error(_describe_unexpected(error))
            raise typer.Exit(1) from None
        except BaseException as error:
            if _debug or type(error).__name__ != "PanicException":  # of a library in Rust, and no Exception
                raise
            console.error(f"a library cannot handle a file of the model: {first_line(error)}.")
            raise typer.Exit(1) from None

    return run


for _name, _command in (
    ("build", build.build),
    ("inspect", inspect.inspect),
    ("diff", diff.diff),
    ("generate", generate.generate),
    ("chat", chat.chat),
    ("trace", trace.trace),
    ("batch", batch.batch),
    ("serve", serve.serve),
    ("count-params", count_params.count_params),
    ("cost", cost.cost),
    ("list", list_parts.list_parts),
    ("doctor", doctor.doctor),
    ("train", train.train),
    ("data", data.data),
    ("eval", eval.evaluate),
    ("sweep", sweep.sweep),
    ("export", export.export),
    ("push", push.push),
):
    app.command(_name, cls=Command)(_guarded(_command))


def _check_working_directory() -> None:
    """Refuse to work in a folder that was deleted: relative paths lead nowhere there, and torch ends the process.

    Raises:
        VLMError: if there is no working directory.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise VLMError(
            f"the working directory cannot be found: {error.strerror}. Was it deleted? Change to another one: cd ~"
        ) from None


def main() -> int:
    """Run `vlm` and return its exit code."""
    # To import torch and Transformers makes millions of objects that live to the end. Python would take longer to
    # search them for garbage, and to destroy them, than vlm takes to count a model of 9 billion parameters.
    gc.disable()
    silence_libraries_at_start()
    end_at_signals()
    builtins.input = _refuse_question
    open_streams()
    terminal.guard_streams()
    code = _run(app)
    code = _run(flush_streams) or code
    if "torch" not in sys.modules:
        return code
    os._exit(code)


def silence_libraries_at_start() -> None:
    """Keep warnings and progress bars of other libraries off stderr, from their import to the end of the process.

    What matters reaches the user as an error. Only the hub shows a bar, for a download, and only on a terminal.
    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # Libraries read these once, when they are imported; the hub's bars on a terminal do not follow TQDM_DISABLE.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker processes


def _refuse_question(prompt: object = "") -> str:
    """Refuse to ask on stdin, in place of Python's `input`: a piped prompt would be taken for the answer.

    Raises:
        VLMError: always.
    """
    raise VLMError("a library wanted to ask a question on stdin, which vlm does not allow.")


def _run(step: Callable[[], Any]) -> int:
    """Call a function that may end the command, and return the exit code."""
    try:
        step()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BrokenPipeError:
        return 1  # the reader has closed the pipe (`vlm list | head`)
    except OutputError as error:
        _report_output(error)
        return 1
    return 0


def _describe_unexpected(error: Exception) -> str:
    if is_out_of_memory(error):
        return (
            f"memory does not suffice ({first_line(error)}). Choose a smaller model or batch, fewer bits for each "
            "weight (--dtype bfloat16, --quantize), or a device with more memory (--device)."
        )
    return f"{type(error).__name__}: {first_line(error)}. Run `vlm --debug …` to see where."


def _report_output(error: OutputError) -> None:
    console.error(f"cannot write the output: {error.strerror}.")
