"""A hub on the loopback that speaks the few calls its client makes: repositories, one commit each, files."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"
OWNER, TOKEN = "me", "hf_stub"

_REPO = re.compile(
    r"^/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/(.*))?$"
)
_FILE = re.compile(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class Hub:
    """The repositories: by kind (`models`, `datasets`) and name, the files by path.

    Attributes:
        url: where it listens.
        repos: the files.
        private: the names of private repositories.
        commits: messages of all commits, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.closed = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening, and answer nobody who is connected already."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def answer(self, code: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def parse_request(self) -> bool:
        """Refuse what comes when the hub is gone."""
        if self.hub.closed:
            self.close_connection = True
            return False
        return super().parse_request()

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path, body = unquote(urlparse(self.path).path), self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        found = _REPO.match(path)
        if found and found[3] == "paths-info":
            return self.answer(200, self.entries(found[1], found[2]))
        if not self.known:
            return self.answer(
                401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"}
            )
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or OWNER
            name = f"{owner}/{asked['name']}"
            if owner != OWNER:
                return self.answer(403, {"error": "You don't have the rights"})
            if ("models", name) in self.hub.repos:
                return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.repos["models", name] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(name)
            return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})
        assert found, path
        if found[3] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer(200, {"files": modes})
        if found[3] == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "header":
                    self.hub.commits.append(line["value"]["summary"])
                else:
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repos[found[1], found[2]][line["value"]["path"]] = content
            address = f"{self.hub.url}/{found[2]}/commit/{SHA}"
            return self.answer(200, {"commitUrl": address, "commitOid": SHA})
        return self.answer(404, {"error": path})

    def entries(self, kind: str, repo: str) -> list[dict[str, Any]]:
        files = self.hub.repos.get((kind, repo), {})
        return [
            {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
            for p, b in files.items()
        ]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer(200 if self.known else 401, {"name": OWNER, "type": "user", "orgs": []})
        if found := _REPO.match(path):
            kind, repo = found[1], found[2]
            if (kind, repo) not in self.hub.repos:
                return self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            if found[3] == "tree":
                return self.answer(200, self.entries(kind, repo))
            files = [{"rfilename": p} for p in self.hub.repos[kind, repo]]
            private = repo in self.hub.private
            return self.answer(
                200,
                {"id": repo, "sha": SHA, "private": private, "siblings": files, "tags": [], "gated": False},
            )
        if found := _FILE.match(path):
            files = self.hub.repos.get(("datasets" if found[1] else "models", found[2]), {})
            content = files.get(found[4])
            if content is None:
                return self.answer(
                    404, {"error": "no"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}
                )
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            if ranged := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                last = int(ranged[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {ranged[1]}-{last}/{len(content)}"
                return self.answer(206, content[int(ranged[1]) : last + 1], headers)
            return self.answer(200, content, {**headers, "Content-Length": str(len(content))})
        return self.answer(404, {"error": path})

    do_HEAD = do_GET
