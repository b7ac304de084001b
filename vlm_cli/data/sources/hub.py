"""Data sets of the Hugging Face hub: `hf:ORG/NAME[:CONFIG][:SPLIT]`. Their shards are downloaded when they are read.

`datasets` finds the files of a configuration; it runs no code of a data set. The library of the hub keeps what it
downloads in its cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_cli.data.sources.files import Shards
from vlm_cli.data.sources.folders import choose_split
from vlm_cli.errors import DataError, UsageError, first_line
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.offline import use_cache_without_network
from vlm_cli.registry import suggest

__all__ = ["HUB", "OnHub", "find_on_hub"]

HUB = "hf:"
_FILE = re.compile(r"hf://datasets/(.+?)@([^/]+)/(.+)")


@dataclass(frozen=True)
class OnHub:
    """The files of a data set.

    Attributes:
        shards: of one split.
        detail: what the log tells of the choice.
    """

    shards: HubShards
    detail: str


class HubShards(Shards):
    """Files of a commit of a data set. The first is downloaded at once, the others when they are read."""

    def __init__(self, repository: str, commit: str, names: list[str]) -> None:
        self.repository, self.commit, self.names = repository, commit, names
        self._local: dict[int, Path] = {}
        self.folder = Path(str(self.path(0))[: -len(names[0])])

    def is_here(self, index: int) -> bool:
        return index in self._local

    def identity(self) -> str:
        return f"{self.repository}@{self.commit} {self.names}"

    def path(self, index: int) -> Path:
        if index not in self._local:
            from huggingface_hub import hf_hub_download

            use_cache_without_network()
            name = self.names[index]
            try:
                found = hf_hub_download(self.repository, name, revision=self.commit, repo_type="dataset")
            except Exception as error:
                raise DataError(
                    f"cannot download {name!r} of the data set {self.repository!r}: {first_line(error)}"
                ) from None
            self._local[index] = Path(found)
        return self._local[index]


def find_on_hub(text: str) -> OnHub:
    """Find the files of a data set.

    Raises:
        UsageError: if `datasets` is not installed, or the text is no `hf:ORG/NAME[:CONFIG][:SPLIT]`.
        DataError: if the hub has no such data set, configuration or split.
    """
    name, *rest = text.removeprefix(HUB).split(":")
    if not is_hub_id(name) or len(rest) > 2 or not all(rest):
        raise UsageError(
            f"{text!r} is no data set of the hub. Write hf:ORG/NAME, hf:ORG/NAME:CONFIG or hf:ORG/NAME:CONFIG:SPLIT."
        )
    if Path(name).is_dir():  # which `datasets` would read in the place of the hub's
        raise DataError(
            f"{text!r} means a data set of the hub, but there is a folder {name!r} here. To read the folder, give it "
            f"without {HUB!r}; to read the hub's, run the command in another folder, and give other paths from there."
        )
    configurations = _configurations(text, name)
    known = ", ".join(configurations)
    if len(rest) == 1 and rest[0] not in configurations and len(configurations) == 1:
        rest = [*configurations, rest[0]]  # ORG/NAME:SPLIT
    if rest and rest[0] not in configurations:
        raise DataError(
            f"the data set {name!r} has no configuration {rest[0]!r}.{suggest(rest[0], configurations)} Known: {known}."
        )
    if not rest and len(configurations) > 1 and "default" not in configurations:
        raise DataError(f"the data set {name!r} has several configurations: {known}. Give one: hf:{name}:CONFIG")
    configuration = rest[0] if rest else ("default" if "default" in configurations else configurations[0])
    files = _data_files(text, name, configuration)
    if len(rest) == 2 and rest[1] not in files:
        raise DataError(
            f"the data set {name!r} has no split {rest[1]!r}.{suggest(rest[1], files)} Known: {', '.join(files)}."
        )
    split = (
        rest[1]
        if len(rest) == 2
        else choose_split(list(files), f"the data set {name!r}", f"hf:{name}:{configuration}:SPLIT")
    )
    found = [_FILE.fullmatch(x) for x in files[split]]
    if not found or not all(x is not None and x[1] == name for x in found):
        raise DataError(f"the split {split!r} of the data set {name!r} has files that are not in its repository.")
    names = [x[3] for x in found if x is not None]
    assert found[0] is not None
    detail = f"configuration {configuration}, split {split}, commit {found[0][2][:12]}"
    return OnHub(HubShards(name, found[0][2], names), detail)


def _configurations(text: str, name: str) -> list[str]:
    return _ask(text, name, lambda datasets: list(datasets.get_dataset_config_names(name)))


def _data_files(text: str, name: str, configuration: str) -> dict[str, list[str]]:
    def ask(datasets: Any) -> dict[str, list[str]]:
        builder = datasets.load_dataset_builder(name, configuration)
        return {str(split): [str(x) for x in files] for split, files in (builder.config.data_files or {}).items()}

    return _ask(text, name, ask)


def _ask(text: str, name: str, question: Any) -> Any:
    from importlib.util import find_spec

    if find_spec("datasets") is None:
        raise UsageError(f"{text!r} is read by `datasets`, which is not installed: pip install 'vlm-cli[data]'")
    use_cache_without_network()
    import datasets

    datasets.disable_progress_bars()
    try:
        return question(datasets)
    except Exception as error:  # of a dozen types, of four libraries
        raise DataError(f"cannot read the data set {name!r} of the hub: {first_line(error)}") from None
