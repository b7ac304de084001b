"""A hub on this machine: what huggingface_hub asks for when models are read and pushed, over plain HTTP.

Source of the protocol: huggingface_hub's `file_download.py`, `hf_api.py`, `_commit_api.py` and `lfs.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from vlm_cli.report.card_sections import Card

__all__ = ["Hub", "serving", "serving_here"]

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """Commits, oldest first, names for some of them, and whether only its owner sees it."""

    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    private: bool = False

    @property
    def newest(self) -> Files:
        return self.commits[self.names["main"]]

    def commit(self, files: Files, name: str = "main") -> str:
        parts = [str(len(self.commits)), *(f"{k}{hashlib.sha1(x).hexdigest()}" for k, x in sorted(files.items()))]
        oid = hashlib.sha1("".join(parts).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.names[name] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.names.get(revision)


@dataclass
class Hub:
    """Repositories by name, large files by hash, and each request that came.

    Attributes:
        breaks_after: large files that the hub still stores, before each further one breaks; None stores all.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    address: str = ""
    breaks_after: int | None = None

    def add(self, repository: str, folder: Path, name: str = "main") -> str:
        """A commit that holds the files of a folder."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.repositories.setdefault(repository, Repository()).commit(files, name)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving_here() -> Iterator[Hub]:
    """A hub that the libraries of this process use, which otherwise has none."""
    from huggingface_hub import constants, hf_api

    with serving() as hub, pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as cache:
        settings = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": cache}
        for name, x in settings.items():
            patch.setattr(constants, name, x)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        patch.setattr(hf_api.api, "endpoint", hub.address)
        yield hub


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing on the terminal if a client goes away."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        for pattern, method in self.ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                method(self, *found.groups(), body)
                return
        self.hub.unknown.append(f"{self.command} {path}")
        self._error(404, "EntryNotFound")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def _commit(self, name: str, revision: str) -> tuple[str, Files] | None:
        """The commit that was asked for; answers the request itself if there is none."""
        repository = self.hub.repositories.get(name)
        oid = None if repository is None else repository.find(revision)
        if oid is None:
            self._error(404, "RepoNotFound" if repository is None else "RevisionNotFound")
            return None
        assert repository is not None
        return oid, repository.commits[oid]

    # -- reading ------------------------------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        oid, files = found
        if path not in files:
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=oid)

    def info(self, name: str, revision: str | None, body: bytes) -> None:
        found = self._commit(name, revision or "main")
        if found is not None:
            oid, files = found
            self._json(
                {
                    "id": name,
                    "sha": oid,
                    "private": self.hub.repositories[name].private,
                    "tags": [],
                    "siblings": [{"rfilename": x} for x in files],
                    "cardData": _metadata(files.get("README.md", b"").decode()),
                }
            )

    def tree(self, name: str, revision: str, folder: str | None, body: bytes) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        start = "" if folder is None else f"{folder}/"
        below = {path: x for path, x in found[1].items() if path.startswith(start)}
        if not below and start:
            self._error(404, "EntryNotFound")
            return
        nested = {start + path[len(start) :].split("/")[0] for path in below if "/" in path[len(start) :]}
        folders = [
            {"type": "directory", "path": x, "size": 0, "oid": hashlib.sha1(x.encode()).hexdigest()} for x in nested
        ]
        is_recursive = "recursive=true" in urlsplit(self.path).query.lower()
        files = [_entry(path, x) for path, x in below.items() if is_recursive or "/" not in path[len(start) :]]
        self._json([*folders, *files])

    def paths(self, name: str, revision: str, body: bytes) -> None:
        found = self._commit(name, revision)
        if found is not None:
            asked = json.loads(body)["paths"]
            self._json([_entry(path, found[1][path]) for path in asked if path in found[1]])

    # -- pushing ------------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        data = json.loads(body)
        name = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
        there = name in self.hub.repositories
        if not there:
            self.hub.repositories[name] = Repository(private=data.get("private") or data.get("visibility") == "private")
            self.hub.repositories[name].commit({})
        answer = {"url": f"{self.hub.address}/{name}", "id": name}
        self._send(409 if there else 200, json.dumps(answer).encode(), Content_Type="application/json")

    def yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        def mode(path: str) -> dict[str, Any]:
            large = path.endswith(".safetensors")
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        self._json({"files": [mode(file["path"]) for file in json.loads(body)["files"]]})

    def batch(self, name: str, body: bytes) -> None:
        def action(o: Mapping[str, Any]) -> dict[str, Any]:
            if o["oid"] in self.hub.large:
                return dict(o)  # it is here, and need not be sent
            return {**o, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}"}}}

        self._json({"transfer": "basic", "objects": [action(o) for o in json.loads(body)["objects"]]})

    def store(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        if self.hub.breaks_after is not None and len(self.hub.large) >= self.hub.breaks_after:
            self._error(403, "Broken")
            return
        self.hub.large[oid] = body
        self._send(200, b"")

    def commit(self, name: str, revision: str, body: bytes) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        files = dict(found[1])
        parent = json.loads(body.splitlines()[0])["value"].get("parentCommit")
        if parent is not None and parent != found[0]:
            self._error(412, "PreconditionFailed")
            return
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = self.hub.repositories[name].commit(files, revision)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    ROUTES = (
        (r"(?:GET|HEAD) /(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
        (r"GET /api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", info),
        (r"GET /api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", tree),
        (r"POST /api/(?:models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", paths),
        (r"POST /api/repos/create", create),
        (r"POST /api/validate-yaml", yaml),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)", preupload),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        (r"PUT /lfs/([0-9a-f]+)", store),
        (r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)", commit),
    )


def _metadata(card: str) -> Mapping[str, Any]:
    try:
        return Card.parse(card).metadata
    except ValueError:
        return {}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}
