"""Fetch http(s) addresses: within a deadline, and only from hosts that a fetch may reach.

A host whose address is private, loopback, link-local, multicast or reserved is refused unless the user names it
(`--allow-host`), so that an address in a file or a redirect cannot make vlm ask a server inside the user's network. The
check follows name resolution, and the connection goes to the address that was checked. A proxy that the environment
names (HTTP_PROXY) is the user's choice: vlm connects to it, checks the names that this machine can resolve, and leaves
the others to the proxy.

The deadline covers the whole exchange: name resolution, connection, TLS, headers, redirects and body. `http.client`
limits only the time between two packets, so a watchdog shuts the connection down.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, cast
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit

__all__ = ["MAX_SECONDS", "Download", "HostRefused", "is_internal", "open_url"]

WAIT = 20.0  # seconds until the first bytes of the body
MAX_SECONDS = 120.0  # seconds for the whole exchange of one image
MIN_RATE = 50_000  # bytes per second of a body that may take longer than `WAIT`
MAX_REDIRECTS = 10


class HostRefused(OSError):
    """A host whose address vlm does not connect to; the message names the flag that allows it."""


class Download:
    """The body of an answer.

    Attributes:
        length: bytes that the server announced; None if it did not say.
    """

    def __init__(self, response: HTTPResponse, deadline: _Deadline) -> None:
        self._response = response
        self._deadline = deadline
        self.length = response.length

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; none at the end.

        Raises:
            TimeoutError: if the deadline has passed.
            OSError, http.client.HTTPException: if the connection breaks.
        """
        data = self._response.read1(size)
        self._deadline.check()  # a connection that the watchdog shut down looks like the end of the body
        self._deadline.extend(len(data))
        return data


@contextmanager
def open_url(
    url: str, *, allow_hosts: Collection[str] = (), max_seconds: float | None = MAX_SECONDS
) -> Iterator[Download]:
    """Open an http(s) address, follow its redirects, and give the body.

    Args:
        url: the address; characters outside ASCII are quoted.
        allow_hosts: names and addresses that may be internal.
        max_seconds: time for the whole exchange; None sets no limit for a body that arrives at `MIN_RATE`.

    Raises:
        HostRefused: if the address, or that of a redirect, is internal and not allowed.
        TimeoutError: if the deadline passes.
        HTTPError: if the server answers with an error.
        OSError, ValueError, http.client.HTTPException: if the address or the answer cannot be read.
    """
    deadline = _Deadline(max_seconds)
    try:
        with _follow(url, _Guard(frozenset(x.lower() for x in allow_hosts), deadline)) as response:
            yield Download(response, deadline)
    except Exception as error:
        deadline.check()
        if isinstance(error, URLError) and isinstance(error.reason, OSError):
            raise error.reason from None  # urllib wraps what a connection raises
        raise
    finally:
        deadline.close()


def _follow(url: str, guard: _Guard) -> HTTPResponse:
    """Return the first answer that is no redirect. `urlopen` would read the bodies of redirects without a limit."""
    for _ in range(MAX_REDIRECTS + 1):
        try:
            return guard.ask(url)
        except HTTPError as error:
            target = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or not target:
                raise
            error.close()
            url = urljoin(url, target)
    raise OSError(f"it redirects more than {MAX_REDIRECTS} times")


class _Guard:
    """Connects to hosts that a fetch may reach, and to no others."""

    def __init__(self, allowed: frozenset[str], deadline: _Deadline) -> None:
        self.allowed = allowed
        self.deadline = deadline
        self.has_proxy = False

    def ask(self, url: str) -> HTTPResponse:
        """Send one request.

        Raises:
            OSError, ValueError, http.client.HTTPException: as `open_url`.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise ValueError(f"it leads to an address that begins with {parts.scheme}:, and vlm fetches http and https")
        self.has_proxy = parts.scheme in request.getproxies() and not request.proxy_bypass(parts.netloc)
        if self.has_proxy:
            self._check_behind_proxy(unquote(parts.hostname or ""))
        opener = request.OpenerDirector()
        for handler in (
            request.ProxyHandler(),
            _HTTPHandler(self),
            _HTTPSHandler(self),
            request.HTTPErrorProcessor(),
            request.HTTPDefaultErrorHandler(),
            request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        # Some hosts refuse requests with Python's own User-Agent.
        quoted = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        asked = request.Request(quoted, headers={"User-Agent": "vlm-cli"})
        return cast("HTTPResponse", opener.open(asked, timeout=WAIT))

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Connect to a host; takes the place of `socket.create_connection` in `http.client`.

        Raises:
            HostRefused: if the host is internal and not allowed.
            OSError: if no address of the host can be reached.
        """
        host, port = address
        found = self._resolve(host, port)
        if not self.has_proxy:
            self._check(host, found)
        failure: OSError = OSError(f"{host!r} has no address")
        for family, kind, protocol, _, place in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self.deadline.left())
                connection.connect(place)
                connection.settimeout(WAIT)
                self.deadline.watch(connection)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure

    def _check_behind_proxy(self, host: str) -> None:
        try:
            found = self._resolve(host, None)
        except OSError:
            return  # only the proxy knows the name
        self._check(host, found)

    def _check(self, host: str, found: list[Any]) -> None:
        """Check that no address of a host is internal, unless the user names the host or the address.

        Raises:
            HostRefused: for the first such address.
        """
        for *_, place in found:
            if is_internal(place[0]) and not self.allowed & {host.lower(), place[0]}:
                shown = host if host == place[0] else f"{host} ({place[0]})"
                raise HostRefused(
                    f"{shown} is an internal address, which vlm does not ask unless you name it: --allow-host {host}"
                )

    def _resolve(self, host: str, port: int | None) -> list[Any]:
        """Return the addresses of a host, as `socket.getaddrinfo`, which itself knows no time limit.

        Raises:
            OSError: if the name is unknown, or the answer takes too long.
        """
        found: list[Any] = []

        def ask() -> None:
            try:
                found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:  # UnicodeError for a name that cannot be one
                found.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.deadline.left())
        if not found:
            raise TimeoutError(f"the address of {host!r} takes longer than {WAIT:.0f} seconds to find")
        if isinstance(found[0], Exception):
            raise found[0]
        return cast("list[Any]", found[0])


def is_internal(address: str) -> bool:
    """Tell whether an IP address belongs to this machine, a private network or no network at all.

    >>> [is_internal(x) for x in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::ffff:127.0.0.1", "1.1.1.1")]
    [True, True, True, True, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, (ip.teredo or (None, None))[1]]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: the last four bytes are an IPv4 address
            inner.append(ipaddress.IPv4Address(ip.packed[-4:]))
        if carried := [x for x in inner if x is not None]:
            return any(is_internal(str(x)) for x in carried)
        if ip.is_site_local:
            return True
    return not ip.is_global or ip.is_multicast or ip.is_reserved


class _Deadline:
    """The end of an exchange. A thread shuts the watched connections down when it passes.

    It lies `WAIT` seconds ahead at first. Each byte of a body moves it, so that a body that arrives at `MIN_RATE` may
    take `max_seconds` (None: any time), and a trickle may not.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self.started = time.monotonic()
        self.max_seconds = max_seconds
        self.seconds = WAIT if max_seconds is None else min(WAIT, max_seconds)
        self.watched: list[socket.socket] = []
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: if none are left.
        """
        left = self.started + self.seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"it takes longer than {self.seconds:.0f} seconds")
        return left

    def check(self) -> None:
        """Raise TimeoutError if the deadline has passed."""
        self.left()

    def extend(self, received: int) -> None:
        """Move the deadline for bytes that arrived."""
        seconds = self.seconds + received / MIN_RATE
        self.seconds = seconds if self.max_seconds is None else min(seconds, self.max_seconds)

    def watch(self, connection: socket.socket) -> None:
        """Shut a connection down when the deadline passes."""
        with self.lock:
            # A copy, because TLS takes the socket over. Shutting the copy down ends both.
            self.watched.append(connection.dup())
            if self.thread is None:
                self.thread = threading.Thread(target=self._wait, daemon=True)
                self.thread.start()

    def _wait(self) -> None:
        while True:
            left = self.started + self.seconds - time.monotonic()
            if self.closed.wait(max(left, 0)):
                return
            if time.monotonic() >= self.started + self.seconds:
                break
        with self.lock:
            for connection in self.watched:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the other side was faster
                    continue

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()
        with self.lock:
            for connection in self.watched:
                connection.close()
            self.watched.clear()


class _GuardedConnection(HTTPConnection):
    """A connection to a host that a fetch may reach; `set_guard` must follow."""

    def set_guard(self, guard: _Guard) -> None:
        """Make the guard open the socket."""
        assert hasattr(self, "_create_connection"), "http.client opens its sockets in another way"
        self._create_connection = guard.connect


class _GuardedTLSConnection(HTTPSConnection, _GuardedConnection):
    """The same with TLS: `http.client` checks the certificate against the host's name."""


class _GuardedHandler(request.AbstractHTTPHandler):
    """Opens addresses over guarded connections."""

    connection: type[_GuardedConnection]

    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self.guard = guard

    def _open(self, req: request.Request) -> HTTPResponse:
        return self.do_open(cast("Any", self._connect), req)

    def _connect(self, host: str, **keywords: Any) -> _GuardedConnection:
        connection = self.connection(host, **keywords)
        connection.set_guard(self.guard)
        return connection


class _HTTPHandler(_GuardedHandler, request.HTTPHandler):
    connection = _GuardedConnection
    http_open = _GuardedHandler._open


class _HTTPSHandler(_GuardedHandler, request.HTTPSHandler):
    connection = _GuardedTLSConnection
    https_open = _GuardedHandler._open
