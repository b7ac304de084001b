"""Send the output of a run to the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vlm_cli.checkpoint.run_record import RUN_FILE
from vlm_cli.errors import CheckpointError, UsageError, VLMError, first_line
from vlm_cli.hub_ids import is_hub_id

__all__ = ["make_repository", "push"]


def make_repository(name: str) -> None:
    """Make a repository on the hub if there is none: before the run, since only this shows that the user may write.

    Args:
        name: ORG/NAME, or NAME for one of the user's own.

    Raises:
        UsageError: if the name cannot be that of a repository, or the user may not write there.
    """
    if not is_hub_id(name):
        raise UsageError(f"--push-to-hub expects ORG/NAME, got {name!r}.")
    with _explained(UsageError, f"cannot push to {name!r}", "Log in with `hf auth login`, or leave out --push-to-hub."):
        from huggingface_hub import create_repo

        create_repo(name, exist_ok=True)


def push(out: Path, name: str) -> None:
    """Send the files of a model's directory. Its record of the run stays here, since it names folders of this machine.

    Raises:
        CheckpointError: if the hub does not take them. The directory stays.
    """
    with _explained(CheckpointError, f"cannot push to {name!r}", f"{out} is written. Type: hf upload {name} {out}"):
        from huggingface_hub import upload_folder

        upload_folder(
            repo_id=name, folder_path=out, ignore_patterns=[RUN_FILE], commit_message=f"Train {out.name} with vlm"
        )


@contextlib.contextmanager
def _explained(kind: type[VLMError], what: str, hint: str) -> Iterator[None]:
    """Turn an error of the hub's library, or of the network below it, into one for the user."""
    try:
        yield
    except (OSError, ValueError) as error:  # the library's errors are among them, and those of httpx are not
        raise kind(f"{what}: {first_line(error)}. {hint}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "huggingface_hub"):
            raise
        raise kind(f"{what}: {first_line(error)}. {hint}") from error
