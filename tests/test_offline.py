"""A machine without a network."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator

import pytest
from huggingface_hub import constants, is_offline_mode

import vlm_cli
from vlm_cli import offline
from vlm_cli.errors import CheckpointError, VLMWarning


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that accepts connections and says nothing; the hub's library asks it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(offline, "_offline_since", None)
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield listening


def test_a_hub_out_of_reach_is_told_of_once_and_tried_again(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offline.use_cache_without_network()  # it accepts connections
    assert not is_offline_mode()
    server.close()
    with pytest.warns(VLMWarning, match="no network: .* Files of the hub come from the cache"):
        offline.use_cache_without_network()
    assert is_offline_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offline.use_cache_without_network()
    assert offline._offline_since is not None
    with socket.create_server(("127.0.0.1", 0)) as again:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{again.getsockname()[1]}")
        monkeypatch.setattr(offline, "_offline_since", offline._offline_since - 2 * offline._ASK_AGAIN)
        offline.use_cache_without_network()
    assert not is_offline_mode()


def test_the_choice_of_the_user_stays(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.close()
    offline.use_cache_without_network()
    assert offline._offline_since is None


def test_nothing_is_asked_twice_without_a_network(server: socket.socket) -> None:
    """The hub's library alone would try for half a minute for each file."""
    server.close()
    with pytest.warns(VLMWarning, match="no network"), pytest.raises(CheckpointError, match="cached"):
        vlm_cli.load("org/none")
