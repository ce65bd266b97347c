"""A Hub of our own on this machine: enough of its API for huggingface_hub to list revisions and to fetch one."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Directories of files by revision.
Revisions = dict[str, Path]


def commit_of(revision: str) -> str:
    """A commit's name."""
    return hashlib.sha1(revision.encode()).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    repository: str
    revisions: Revisions
    asked: list[str]
    failing: set[str]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        top = f"/api/models/{self.repository}"
        if path == f"{top}/refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(name)} for name in self.revisions
            ]
            self._json({"branches": branches, "converts": [], "tags": []})
        elif path.startswith(f"{top}/revision/"):
            self._info(path.removeprefix(f"{top}/revision/"))
        elif path.startswith(f"{top}/tree/"):
            self._tree(path.removeprefix(f"{top}/tree/"))
        elif path.startswith(f"/{self.repository}/resolve/"):
            self._file(*path.removeprefix(f"/{self.repository}/resolve/").split("/", 1))
        else:
            self.send_error(404)

    def _revision(self, name: str) -> str | None:
        return next((r for r in self.revisions if name in (r, commit_of(r))), None)

    def _info(self, name: str) -> None:
        revision = self._revision(name)
        if revision is None:
            self.send_error(404)
            return
        files = [{"rfilename": file.name} for file in sorted(self.revisions[revision].iterdir())]
        self._json({"id": self.repository, "sha": commit_of(revision), "siblings": files})

    def _tree(self, name: str) -> None:
        revision = self._revision(name.strip("/"))
        files = sorted(self.revisions[revision].iterdir()) if revision else []
        self._json(
            [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                }
                for f in files
            ]
        )

    def _file(self, name: str, file: str) -> None:
        revision = self._revision(name)
        if revision is None or revision in self.failing:
            self.send_error(503 if revision else 404)
            return
        if self.command == "GET":
            self.asked.append(f"{revision}/{file}")
        data = (self.revisions[revision] / file).read_bytes()
        headers = {"X-Repo-Commit": commit_of(revision), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        self._send(data, headers)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def hub(repository: str, revisions: Revisions) -> Iterator[tuple[str, type[_Hub]]]:
    """The Hub's address while it runs, and its record: files that were ``asked`` for, revisions that are ``failing``."""
    handler = type(
        "Handler", (_Hub,), {"repository": repository, "revisions": revisions, "asked": [], "failing": set()}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
