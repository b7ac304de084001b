"""A repository of the Hugging Face hub: whether a model may be sent there, and one commit that sends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_cli.errors import CheckpointError, UsageError, VLMError, first_line
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.manifest import MANIFEST_FILE
from vlm_cli.plain_data import read_json, read_text
from vlm_cli.publishing.cards import CARD_FILE

__all__ = ["Repository", "explained", "open_repository"]

_EMPTY = (".gitattributes", CARD_FILE, "LICENSE")  # what the hub itself puts into a new repository


@dataclass(frozen=True)
class Repository:
    """A repository that takes models of vlm.

    Attributes:
        name: ORG/NAME.
        commit: the newest one.
        files: that it holds.
        card: text of its README.md; None without one.
        written: files that its manifest names, thus that vlm wrote.
    """

    name: str
    commit: str
    files: tuple[str, ...]
    card: str | None
    written: tuple[str, ...]

    def send(self, files: Mapping[str, Path | bytes], *, message: str, advice: str) -> str:
        """Send files in one commit: the repository has all of them afterwards, or none.

        The library sends no large file twice, so that a second try sends what the first did not.

        Args:
            files: name in the repository -> file, or its content.
            message: of the commit.
            advice: what the user should type after an error.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: if the hub does not take them.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        sent = [CommitOperationAdd(name, x if isinstance(x, bytes) else str(x)) for name, x in files.items()]
        stale = [CommitOperationDelete(x) for x in self.written if x in self.files and x not in files]
        with explained(CheckpointError, f"cannot push to {self.name!r}", f"The repository is as it was. {advice}"):
            found = HfApi().create_commit(self.name, [*sent, *stale], commit_message=message, parent_commit=self.commit)
        return str(found.commit_url)


def open_repository(name: str, *, option: str, private: bool = False, force: bool = False) -> Repository:
    """Open a repository, and make it if there is none, which alone shows that the user may write.

    Args:
        name: ORG/NAME, or NAME for one of the user's own.
        option: how the user gave the name, for errors.
        private: whether a new repository is private.
        force: whether it may hold something else than a model of vlm.

    Raises:
        UsageError: if the name cannot be that of a repository, the user may not write there, or it holds other files.
    """
    if not is_hub_id(name):
        raise UsageError(f"{option} expects ORG/NAME, got {name!r}.")
    with explained(UsageError, f"cannot push to {name!r}", f"Log in with `hf auth login`, or give another {option}."):
        from huggingface_hub import HfApi

        api = HfApi()
        name = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        info = api.model_info(name)
        files = tuple(x.rfilename for x in info.siblings or ())
        read = {x: Path(api.hf_hub_download(name, x, revision=info.sha)) for x in _READ if x in files}
        card = read_text(read[CARD_FILE]) if CARD_FILE in read else None
    if private and not info.private:
        raise UsageError(
            f"the repository {name!r} exists and is public, so that --private has no effect. Change it on its page, or "
            "give another name."
        )
    if not force and not _is_empty(files) and not _is_vlm(read.get("config.json")):
        raise UsageError(
            f"the repository {name!r} exists and holds something else than a model of vlm ({_some(files)}). Give "
            "another name, or --force to add the files of the model to it."
        )
    return Repository(name, str(info.sha), files, card, _written(read.get(MANIFEST_FILE)))


_READ = ("config.json", CARD_FILE, MANIFEST_FILE)


def _is_empty(files: Sequence[str]) -> bool:
    return all(name in _EMPTY for name in files)


def _is_vlm(config: Path | None) -> bool:
    try:
        data = {} if config is None else read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(data, Mapping) and data.get("model_type") == "vlm"


def _written(manifest: Path | None) -> tuple[str, ...]:
    """Return the names of files in a manifest; none if it cannot be read."""
    try:
        data = {} if manifest is None else read_json(manifest)["files"]
        return tuple(x for x in data if isinstance(x, str))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _some(files: Sequence[str]) -> str:
    shown = [x for x in files if x not in _EMPTY]
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")


@contextlib.contextmanager
def explained(kind: type[VLMError], what: str, hint: str) -> Iterator[None]:
    """Turn an error of the hub's library, or of the network below it, into one for the user.

    The library passes on errors of several others, so that no list of classes holds them all.
    """
    try:
        yield
    except VLMError:
        raise
    except Exception as error:
        cause = "" if error.__cause__ is None else f" ({first_line(error.__cause__)})"
        raise kind(f"{what}: {first_line(error)}{cause}. {hint}") from error
