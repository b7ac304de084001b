"""Download a weight file that somebody else's record names: bounded, under a temporary name, kept if it is right."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from vlm_cli.errors import CheckpointError
from vlm_cli.interrupt import removed_at_end
from vlm_cli.network import open_url
from vlm_cli.renames import remove_tree

__all__ = ["downloaded"]

_STEP = 2**20  # bytes per read


@contextmanager
def downloaded(url: str, *, key: str, most: int, allow_hosts: Collection[str] = ()) -> Iterator[Path]:
    """Give the file of an address; it gets a name of its own if the block ends without an error.

    The block checks the content. Until then the file has a temporary name, and an error removes it. A file that an
    earlier block kept is used again.

    Args:
        url: http(s) address.
        key: what the content must be, such as a hash: other content of the same address is another file.
        most: bytes; a longer answer is an error.
        allow_hosts: hosts that may have an internal address.

    Raises:
        CheckpointError: if the file is too large.
        OSError, ValueError, http.client.HTTPException: if it cannot be fetched.
    """
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "vlm" / "backbones"
    digest = hashlib.sha256(f"{key} {url}".encode()).hexdigest()[:24]
    suffix = Path(urlsplit(url).path).suffix
    target = folder / f"{digest}{suffix if re.fullmatch(r'[.][a-z]{1,12}', suffix) else '.pt'}"
    if target.is_file():
        yield target
        return
    folder.mkdir(parents=True, exist_ok=True)

    def make() -> tuple[int, str]:
        return tempfile.mkstemp(prefix=f".{digest}.", suffix=f".partial{target.suffix}", dir=folder)

    with removed_at_end(make, lambda made: remove_tree(Path(made[1]))) as (handle, partial):
        with open(handle, "wb") as file, open_url(url, allow_hosts=allow_hosts, max_seconds=None) as download:
            received = 0
            while data := download.read(_STEP):
                received += len(data)
                if max(received, download.length or 0) > most:
                    raise CheckpointError(f"{url} holds more than the {most:,} bytes that the record allows")
                file.write(data)
        yield Path(partial)
        os.replace(partial, target)
