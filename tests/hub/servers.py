"""A server on 127.0.0.1 that speaks what is needed of the Hub's and of Kaggle's interface: the one mock of these tests.

huggingface_hub and kagglehub are the real ones. The Hub's is found by HF_ENDPOINT; kagglehub's hosts are built in, so
it is told to use http://localhost and this server as its proxy. What the server answers follows the libraries' own
sources and what the sites answered when this was written; that the sites still do is not tested here.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_LARGE = 1000  # bytes from which the Hub keeps a file in LFS, and names it by its SHA-256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One that came in: its path without the query, and the bytes it asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclasses.dataclass(kw_only=True)
class Site:
    """What there is, and how the server misbehaves.

    files: of the Hub's one repository, ORG/REPO.  archives: {version: files} of Kaggle's one variation.
    cut, reset, damaged: how often a download of a file still ends halfway, as if it were done or by a reset, or has a
    wrong byte.
    """

    repo: str = "org/model"
    commit: str = "c" * 40
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    archives: dict[int, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    token: str | None = None  # the one that is known; None: nobody is asked for one
    licence_accepted: bool = True
    status: int | None = None  # answered to everything
    silent: bool = False  # takes requests and never answers
    cut: dict[str, int] = dataclasses.field(default_factory=dict)
    reset: dict[str, int] = dataclasses.field(default_factory=dict)
    damaged: dict[str, int] = dataclasses.field(default_factory=dict)
    requests: list[Request] = dataclasses.field(default_factory=list)
    url: str = ""

    def downloads(self, file: str) -> list[Request]:
        """The requests for the content of a file."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(f"/{file}")]


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """`site` with its URL, while it is served."""

    class Handler(_Handler):
        pass

    Handler.site = site
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.site.requests.append(
            Request(
                method=self.command,
                path=path,
                range=self.headers.get("Range"),
                authorization=self.headers.get("Authorization"),
            )
        )
        if self.site.silent:
            self.connection.recv(1)  # until the other side gives up
            self.close_connection = True
        elif self.site.status is not None:
            self._send(self.site.status, b"{}")
        elif path.startswith("/api/v1/models.ModelApiService/"):
            self._kaggle(path.rpartition("/")[2], json.loads(body))
        elif path.startswith("/storage/"):
            _, _, version, file = path.split("/", 3)
            self._send_file(file, self.site.archives[int(version)][file], {})
        else:
            self._hub(path)

    # The Hub.

    def _hub(self, path: str) -> None:
        site = self.site
        if self._has_wrong_token():
            message = "Invalid credentials in Authorization header"
            self._send(401, b"{}", {"X-Error-Message": message})
        elif path == "/api/models":
            self._send_json([{"id": site.repo}])
        elif f"/{site.repo}/" not in f"{path}/":
            self._send(
                401 if self.headers.get("Authorization") is None else 404, b"{}", _error("RepoNotFound")
            )
        elif path == f"/api/models/{site.repo}/refs":
            refs = [{"name": "main", "ref": "refs/heads/main", "targetCommit": site.commit}]
            tags = [{"name": "v1.0", "ref": "refs/tags/v1.0", "targetCommit": site.commit}]
            self._send_json({"branches": refs, "tags": tags, "converts": []})
        elif path.startswith(f"/api/models/{site.repo}/"):
            kind, revision = path.removeprefix(f"/api/models/{site.repo}/").split("/", 1)
            if revision not in ("main", "v1.0", site.commit):
                self._send(404, b"{}", _error("RevisionNotFound"))
            else:
                self._send_json(_hub_info(site) if kind == "revision" else _hub_tree(site))
        else:
            self._hub_file(path.removeprefix(f"/{site.repo}/resolve/").partition("/")[2])

    def _hub_file(self, file: str) -> None:
        site = self.site
        if not site.licence_accepted:
            known = self.headers.get("Authorization") is not None
            self._send(403 if known else 401, b"{}", _error("GatedRepo"))
        elif file not in site.files:
            self._send(404, b"{}", _error("EntryNotFound") | {"X-Repo-Commit": site.commit})
        else:
            etag = {"ETag": f'"{_hub_name(site.files[file])}"', "X-Repo-Commit": site.commit}
            self._send_file(file, site.files[file], etag)

    def _has_wrong_token(self) -> bool:
        found = self.headers.get("Authorization")
        return self.site.token is not None and found is not None and found != f"Bearer {self.site.token}"

    # Kaggle.

    def _kaggle(self, call: str, asked: Mapping[str, object]) -> None:
        site = self.site
        versions = site.archives
        version = asked.get("versionNumber", max(versions, default=0))
        if self._has_wrong_token():
            self._send_kaggle_error(401, "Unauthenticated")
        elif asked["ownerSlug"] != "google" or asked["modelSlug"] != "paligemma":
            self._send_kaggle_error(404, "Not found")
        elif call == "GetModel":
            framework = {"slug": "variation", "framework": "jax", "versionNumber": max(versions)}
            self._send_json({"instances": [framework]})
        elif asked["instanceSlug"] != "variation" or version not in versions:
            self._send_kaggle_error(404, "Not found")
        elif call == "GetModelInstance":
            self._send_json({"slug": "variation", "framework": "jax", "versionNumber": max(versions)})
        elif call == "ListModelInstanceVersionFiles":
            files = [{"name": name, "size": len(content)} for name, content in versions[version].items()]
            self._send_json({"files": files, "nextPageToken": ""})
        elif not site.licence_accepted:
            self._send_kaggle_error(403, "Permission 'modelInstanceVersions.get' was denied")
        elif asked.get("path") not in versions[version]:
            self._send_kaggle_error(404, "Not found")
        else:
            self._send(
                302, b"", {"Location": f"{site.url}/storage/{version}/{asked['path']}?Signature=abc123"}
            )

    def _send_kaggle_error(self, status: int, message: str) -> None:
        self._send(
            status,
            json.dumps({"code": status, "message": message}).encode(),
            {"Content-Type": "application/json"},
        )

    # Both.

    def _send_json(self, value: object) -> None:
        # Kaggle also tells of its library's newest version, which the library then prints.
        headers = {"Content-Type": "application/json", "X-Kaggle-HubVersion": "99.0.0"}
        self._send(200, json.dumps(value).encode(), headers)

    def _send_file(self, file: str, content: bytes, headers: Mapping[str, str]) -> None:
        """All of it or a range; halfway, or with a wrong byte, where the site says so."""
        site = self.site
        published = base64.b64encode(hashlib.md5(content).digest()).decode()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self._is_due(site.damaged, file):
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {**headers, "Accept-Ranges": "bytes", "x-goog-hash": f"crc32c=AAAAAA==,md5={published}"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        length = (len(content) - start) // 2 if self._is_due(site.cut, file) else None
        if self._is_due(site.reset, file):
            length = (len(content) - start) // 2
            # Closing then sends a reset instead of an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._send(206 if start else 200, content[start:], headers, send=length)

    def _is_due(self, faults: dict[str, int], file: str) -> bool:
        if self.command != "GET" or not faults.get(file, 0):
            return False
        faults[file] -= 1
        return True

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, send: int | None = None
    ) -> None:
        """send: after so many bytes the connection ends."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])
        if send is not None:
            self.close_connection = True


def _error(code: str) -> dict[str, str]:
    return {"X-Error-Code": code}


def _hub_name(content: bytes) -> str:
    if len(content) >= _LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hub_info(site: Site) -> dict[str, object]:
    siblings = []
    for name, content in site.files.items():
        known = {"rfilename": name, "size": len(content), "blobId": "a" * 40}
        if len(content) >= _LARGE:
            known["lfs"] = {"size": len(content), "sha256": _hub_name(content), "pointerSize": 134}
        else:
            known["blobId"] = _hub_name(content)
        siblings.append(known)
    return {"id": site.repo, "sha": site.commit, "siblings": siblings}


def _hub_tree(site: Site) -> list[dict[str, object]]:
    entries = []
    for name, content in site.files.items():
        entry = {"type": "file", "path": name, "size": len(content), "oid": "a" * 40}
        if len(content) >= _LARGE:
            entry["lfs"] = {"oid": _hub_name(content), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries
