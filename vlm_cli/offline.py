"""Notice that the Hugging Face hub cannot be reached, and take its files from the cache from then on.

The hub's library asks for each file five more times, for half a minute, before it looks into its cache.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from vlm_cli.errors import VLMWarning

__all__ = ["cache_alone", "is_cache_alone", "use_cache_without_network"]

_WAIT = 5.0  # seconds that the hub has to accept a connection
_ASK_AGAIN = 60.0  # seconds

_offline_since: float | None = None  # of the monotonic clock; None while the hub is not known to be out of reach
_cache_alone = False


@contextmanager
def cache_alone() -> Iterator[None]:
    """Read inside the block what is on this machine, and download nothing."""
    global _cache_alone
    from huggingface_hub import constants

    before = _cache_alone, constants.HF_HUB_OFFLINE
    _cache_alone = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        _cache_alone, constants.HF_HUB_OFFLINE = before


def is_cache_alone() -> bool:
    """Tell whether nothing may be downloaded now."""
    return _cache_alone


def use_cache_without_network() -> None:
    """Set the hub's library to its cache alone if the hub accepts no connection; warn once, with a `VLMWarning`.

    Call it before a file is asked for. Where the user chose (`HF_HUB_OFFLINE`), or a proxy stands between, nothing
    is tried. A hub that was out of reach is tried again after a minute.
    """
    global _offline_since
    from urllib.request import getproxies

    from huggingface_hub import constants

    if _cache_alone or (constants.HF_HUB_OFFLINE and _offline_since is None):
        return
    if _offline_since is not None and time.monotonic() - _offline_since < _ASK_AGAIN:
        return
    hub = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    if hub.hostname is None or proxies.get(hub.scheme) or proxies.get("all"):
        return
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), _WAIT).close()
    except OSError as error:
        _offline_since, constants.HF_HUB_OFFLINE = time.monotonic(), True
        reason = error.strerror or str(error) or type(error).__name__
        warnings.warn(
            f"no network: {constants.ENDPOINT} does not answer ({reason}). Files of the hub come from the cache.",
            VLMWarning,
            stacklevel=2,
        )
    else:
        _offline_since, constants.HF_HUB_OFFLINE = None, False
