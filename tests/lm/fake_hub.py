"""A hub for tests on the loopback: what `huggingface_hub` asks to download a model, with faults on demand.

As a script it is the other side: `python fake_hub.py` fetches, in a process of its own since the client reads the
environment when it is imported, the models that come as lines of JSON on stdin.
"""

import contextlib
import hashlib
import io
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Request(NamedTuple):
    """A request for a file; `start` is where its range begins."""

    method: str
    commit: str
    file: str
    start: int


@dataclass
class Repo:
    """A model on the hub.

    Attributes:
        commits: commit -> file -> content.
        refs: branch -> commit.
        faults: file -> what is wrong with its body: "drop" and "reset" close the connection half-way, "hang" says
            nothing more from there, "wrong" sends other bytes, "absent" knows no such file. With " once" after it, only
            for the next request. The file "api" stands for the listing of files, which fails as a whole; its faults
            are "drop", "hang", and the answers "503" and "401".
        requests: those for files, in order.
        gated: files are refused.
        names_digests: the listing says the digests, as the hub's does and not every mirror's.
        listed: called after the files of a revision have been listed.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    gated: bool = False
    names_digests: bool = True
    listed: Callable[[], None] = lambda: None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make `files` what the branch is; returns the commit."""
        known = json.dumps([[name, git_sha1(content)] for name, content in sorted(files.items())])
        commit = hashlib.sha1((branch + known).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def bodies(self) -> set[str]:
        """The files whose content was asked for."""
        return {request.file for request in self.requests if request.method == "GET"}

    def fault(self, file: str) -> str:
        fault = self.faults.get(file, "")
        if fault.endswith(" once"):
            del self.faults[file]
        return fault.removesuffix(" once")


class FakeHub:
    """`with FakeHub() as hub` serves `hub.repos` at `hub.url`, large files from `hub.storage` as the real one does."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.closing = threading.Event()
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> "FakeHub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, *_):
        pass  # clients that are gone


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        models = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if models else parts[:2])
        repo = self.server.hub.repos.get(name)
        if repo is None:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        rest = parts[4:] if models else parts[2:]
        if models and rest == ["refs"]:
            found = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.refs.items()]
            return self._json({"branches": found, "converts": [], "tags": []})
        revision, file = rest[1], "/".join(rest[2:])
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if models:
            return self._list(name, repo, commit, repo.names_digests and "blobs" in parse_qs(url.query))
        return self._file(repo, commit, file)

    def _list(self, name: str, repo: Repo, commit: str, blobs: bool):
        fault = repo.fault("api")
        if fault == "hang":
            self.server.hub.closing.wait(10)
        if fault == "503":
            return self._refuse(503, "", "Service Unavailable")
        if fault == "401":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if fault:
            return self._break_off()
        siblings = []
        for file, content in repo.commits[commit].items():
            siblings.append({"rfilename": file})
            if blobs:
                siblings[-1] |= {"size": len(content), "blobId": git_sha1(content)}
            if blobs and file.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
                lfs = {"sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
                siblings[-1] |= {"blobId": git_sha1(pointer.encode()), "lfs": lfs}
        self._json({"_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings})
        repo.listed()

    def _file(self, repo: Repo, commit: str, file: str):
        stored = self.headers["Host"] in self.server.hub.storage
        content = repo.commits[commit].get(file)
        large = file.endswith(LARGE) and content is not None
        if stored or not large or self.command == "HEAD":
            asked = self.headers.get("Range", "bytes=0-")
            start = int(asked.removeprefix("bytes=").split("-")[0])
            repo.requests.append(Request(self.command, commit, file, start))
        if repo.gated:
            return self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", "Access is restricted")
        if content is None or repo.faults.get(file) == "absent":
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if large and not stored:
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", headers | {"Location": self.server.hub.storage + self.path})
        headers["ETag"] = f'"{git_sha1(content)}"'
        if self.command == "HEAD":
            return self._send(200, content, headers)
        return self._body(content, start, headers, repo.fault(file))

    def _body(self, content: bytes, start: int, headers: dict[str, str], fault: str):
        if fault == "wrong":
            content = bytes(255 - byte for byte in content)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content, status = content[start:], 206 if start else 200
        if fault not in ("drop", "reset", "hang"):
            return self._send(status, content, headers)
        self._send(status, content, headers, len(content) // 2)
        self.wfile.flush()
        if fault == "hang":
            self.server.hub.closing.wait(10)
        return self._break_off(fault == "reset")

    def _break_off(self, reset: bool = False):
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    def _json(self, answer: dict):
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        codes = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), codes | (headers or {}))

    def _send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None):
        """`content` as announced, of which only the first `sent` bytes come."""
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])


class Client:
    """The script below in a process of its own, with an environment of its own."""

    def __init__(self, env: dict[str, str]):
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def __call__(self, **asked) -> dict:
        """Ask for one model; see `_serve` for what may be asked."""
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _serve():
    """Answer each line `{"model": ..., "revision": ...}` with the folder, or the error and whether it is expected.

    More keys: "file_size", a limit on the size of files, as a full disk has; "load", give weights of the loaded model.
    """
    import resource
    import time

    from sparse_jax.errors import InputError
    from sparse_jax.lm.hub import fetch

    early = "huggingface_hub" in sys.modules

    from huggingface_hub import constants

    # Small files are to show that a download goes on where it broke off, and no test is to wait for retries.
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 12
    time.sleep = lambda seconds: None
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = {"hub_client_imported_early": early}
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked.get("file_size", unlimited[0]), unlimited[1]))
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                if asked.get("load"):
                    from sparse_jax.lm import load

                    lm = load(asked["model"], asked.get("revision"))
                    answer["embedding"] = lm.params["embed"]["tokens"].tolist()
                else:
                    answer["folder"] = str(fetch(asked["model"], asked.get("revision")))
        except InputError as error:
            answer["refused"] = str(error)
        except Exception as error:
            answer["fault"] = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        print(json.dumps(answer | {"stderr": stderr.getvalue()}), flush=True)


if __name__ == "__main__":
    _serve()
