"""Tell an id of the Hugging Face hub from a path that leads nowhere, before anything asks the hub for it."""

from __future__ import annotations

import re

from vlm_cli.errors import CheckpointError, VLMError

__all__ = ["check_hub_id", "is_hub_id"]

_PART = r"(?=[\w.-]{1,96}(?:/|$))\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?!.*\.git$)(?:{_PART}/)?{_PART}", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Tell whether the hub accepts a name as the id of a repository: NAME or ORG/NAME.

    >>> [is_hub_id(x) for x in ("gpt2", "org/a.b-c", "/tmp/model", "./model", "~/model", "a/b/c", "org/no where")]
    [True, True, False, False, False, False, False]
    """
    return _HUB_ID.fullmatch(name) is not None


def check_hub_id(name: str, possible: str, *, near: str = "", error: type[VLMError] = CheckpointError) -> None:
    """Check that a name, of which there is no file or directory, can be the id of a repository.

    Args:
        name: as the user gave it.
        possible: what the user may give, such as "a directory that `vlm build` wrote".
        near: a sentence that suggests another name, after a space; empty if there is none.
        error: class of the error.

    Raises:
        VLMError: of the class `error`, if the name is a path that leads nowhere.
    """
    if not is_hub_id(name):
        raise error(f"there is no directory {name!r}.{near} Give {possible}, or a hub id (ORG/NAME).")
