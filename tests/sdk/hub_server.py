"""A local model hub for tests: Hugging Face's and ModelScope's protocols over real HTTP, faults on demand.

Large files are served like Hugging Face serves them: the hub redirects to a file storage, here a second
server on another port, which is another origin for a client.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000  # bytes; a larger file is "LFS": it has a sha256 and lies in the file storage


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    files: dict[str, bytes]
    licence: str | None = "apache-2.0"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    branch: str = "main"
    token: str | None = None  # private: everything needs this token
    gated: bool = False  # the listing is open, the files need the token


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of the body that were sent
    is_content: bool = False  # a file's bytes were asked for


@dataclass
class Faults:
    cut_after: int | None = None  # hang up after so many bytes of a file …
    cuts: int = 10**9  # … so many times
    hold_after: int | None = None  # send so many bytes of a file, then nothing until `released`
    corrupt: set[str] = field(default_factory=set)  # files with one wrong byte
    ignore_range: bool = False
    server_errors: int = 0  # answer so many requests with HTTP 500
    html: bool = False  # answer everything with a login page
    listed_size: dict[str, int | None] = field(default_factory=dict)  # the listing lies about the size


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed is no fault of the server
            super().handle_error(request, client_address)


class HubServer:
    """`with HubServer() as hub`: `hub.endpoint` is the address for both protocols."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.released = threading.Event()
        self._servers = [_Server(("127.0.0.1", 0), self._handler(storage)) for storage in (False, True)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repository:
        self.repositories[name] = Repository(files, **options)
        return self.repositories[name]

    @property
    def contents(self) -> list[Request]:
        """The requests for file contents that were answered, in order."""
        return [request for request in self.requests if request.is_content]

    def _handler(self, storage: bool) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.hub, self.seen = (
                    hub,
                    Request(self.command, self.path, dict(_lower(self.headers.items()))),
                )
                hub.requests.append(self.seen)
                (self.storage if storage else self.route)()

            do_HEAD = do_GET

        return Handler


def _lower(items: Any) -> Any:
    return ((key.lower(), value) for key, value in items)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    seen: Request

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # --- what is asked for ---------------------------------------------------------------------------

    def route(self) -> None:
        faults = self.hub.faults
        if faults.server_errors > 0:
            faults.server_errors -= 1
            return self.answer(500, {"error": "internal"})
        if faults.html:
            return self.answer(200, "<html>please log in</html>", {"Content-Type": "text/html"})
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match parts:
            case ["api", "v1", "models", organisation, name, *rest]:
                return self.modelscope(f"{organisation}/{name}", rest, query)
            case ["api", "models", organisation, name, *rest]:
                return self.hugging_face_api(f"{organisation}/{name}", rest, query)
            case ["api", "datasets", organisation, name, *rest]:
                return self.hugging_face_api(f"datasets/{organisation}/{name}", rest, query)
            case ["datasets", organisation, name, "resolve", revision, *file]:
                return self.hugging_face_file(f"datasets/{organisation}/{name}", revision, "/".join(file))
            case [organisation, name, "resolve", revision, *file]:
                return self.hugging_face_file(f"{organisation}/{name}", revision, "/".join(file))
        return self.answer(404, {"error": "no such route"})

    def storage(self) -> None:
        """The file storage knows a file by its digest; the signature in the address is the permission."""
        digest = self.path.rpartition("/")[2]
        for repository in self.hub.repositories.values():
            for name, content in repository.files.items():
                if sha256(content) == digest:
                    return self.content(name, content, {"ETag": f'"{digest}"'})
        return self.answer(404, {"error": "no such blob"})

    # --- Hugging Face --------------------------------------------------------------------------------

    def hugging_face_api(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        repository = self.hugging_face_repository(name, listing=True)
        if repository is None:
            return
        kind, revision = (rest[0], rest[1]) if rest else ("revision", repository.branch)
        if revision not in (repository.branch, repository.commit):
            return self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            return self.answer(200, [self.tree_entry(path, data) for path, data in repository.files.items()])
        siblings = [
            self.sibling(path, content) if "blobs" in query else {"rfilename": path}
            for path, content in repository.files.items()
        ]
        description: dict[str, Any] = {
            "id": name,
            "modelId": name,
            "sha": repository.commit,
            "siblings": siblings,
            "tags": [],
        }
        description |= {
            "private": repository.token is not None,
            "gated": "auto" if repository.gated else False,
        }
        description["cardData"] = {"license": repository.licence} if repository.licence else None
        return self.answer(200, description)

    def sibling(self, path: str, content: bytes) -> dict[str, Any]:
        size = self.hub.faults.listed_size.get(path, len(content))
        entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": git_blob(content)}
        if len(content) > LARGE:
            entry["lfs"] = {"sha256": sha256(content), "size": size, "pointerSize": 134}
        return entry

    def tree_entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        if len(content) > LARGE:
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def hugging_face_file(self, name: str, revision: str, path: str) -> None:
        repository = self.hugging_face_repository(name, listing=False)
        if repository is None:
            return
        content = repository.files.get(path)
        if content is None or revision not in (repository.branch, repository.commit):
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{git_blob(content)}"'}
        if len(content) <= LARGE:
            return self.content(path, content, headers)
        digest = sha256(content)
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return self.answer(302, "", headers | {"Location": f"{self.hub.storage}/signed/{digest}"})

    def hugging_face_repository(self, name: str, listing: bool) -> Repository | None:
        """The repository, or None after the answer that the real hub gives in its place."""
        repository = self.hub.repositories.get(name)
        given = self.seen.headers.get("authorization")
        if repository is None or (repository.token and not repository.gated and not self.allowed(repository)):
            # To the unknown, the hub does not tell a private repository from a missing one.
            self.answer(404 if given else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.gated and not listing and not self.allowed(repository):
            self.answer(403 if given else 401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def allowed(self, repository: Repository) -> bool:
        return self.seen.headers.get("authorization") == f"Bearer {repository.token}"

    # --- ModelScope ----------------------------------------------------------------------------------

    def modelscope(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        repository = self.hub.repositories.get(name)
        revision = query.get("Revision", "master")
        if repository is None or (repository.token and not self.allowed(repository)):
            return self.answer(404, {"Code": 10010205001, "Message": "record not found", "Success": False})
        if revision not in ("master", repository.commit):
            return self.answer(200, {"Code": 10010205002, "Message": "no such revision", "Success": False})
        match rest:
            case []:
                return self.data({"Name": name, "License": "Apache License 2.0"})
            case ["repo", "files"]:
                tree = {"Path": "folder", "Name": "folder", "Type": "tree", "Size": 0, "Sha256": ""}
                return self.data({"Files": [tree, *self.modelscope_files(repository)]})
            case ["repo"]:
                path = query["FilePath"]
                if path not in repository.files:
                    return self.answer(
                        404, {"Code": 10010205003, "Message": "no such file", "Success": False}
                    )
                # The live hub honours Range but says 200 where the standard says 206.
                return self.content(path, repository.files[path], {}, partial_status=200)
        return self.answer(404, {"Code": 404, "Message": "no such route"})

    def modelscope_files(self, repository: Repository) -> list[dict[str, Any]]:
        return [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Type": "blob",
                "Size": self.hub.faults.listed_size.get(path, len(content)),
                "Sha256": sha256(content),
                "IsLFS": len(content) > LARGE,
                # Each file tells the commit that last changed it: the newest is the repository's.
                "Revision": repository.commit if position == 0 else "f" * 40,
                "CommittedDate": 1_700_000_000 - position,
            }
            for position, (path, content) in enumerate(repository.files.items())
        ]

    def data(self, data: dict[str, Any]) -> None:
        self.answer(200, {"Code": 200, "Data": data, "Message": "success", "Success": True})

    # --- answers -------------------------------------------------------------------------------------

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def content(self, name: str, content: bytes, headers: dict[str, str], partial_status: int = 206) -> None:
        faults = self.hub.faults
        if name in faults.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        asked = self.seen.headers.get("range")
        if asked and not faults.ignore_range:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start and start >= len(content):
            return self.answer(416, "", {"Content-Range": f"bytes */{len(content)}"})
        self.send_response(partial_status if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.seen.is_content = True
        self.send_body(content[start:])

    def send_body(self, body: bytes) -> None:
        faults = self.hub.faults
        end = len(body)
        if faults.cut_after is not None and faults.cuts > 0 and faults.cut_after < end:
            faults.cuts -= 1
            end = faults.cut_after
            self.close_connection = True
        try:
            for begin in range(0, end, 16_384):
                if faults.hold_after is not None and begin >= faults.hold_after:
                    self.hub.released.wait()
                block = body[begin : min(begin + 16_384, end)]
                self.wfile.write(block)
                self.seen.sent += len(block)
        except OSError:  # the client is gone
            self.close_connection = True
