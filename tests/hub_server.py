"""A small Hub on loopback: real HTTP, with the routes that reading and uploading a model use.

It keeps repositories in memory as commits of {path: bytes}, refuses as the Hub does (X-Error-Code), answers ranges,
and writes down every request with the number of body bytes that it sent, so that a test can say what was fetched.
"""

import base64
import gzip
import hashlib
import json
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

# Wrong answers to a range of weights: refused for a second, an error, the connection lost midway, a body that is too
# short or too long for the range that it claims to be, a range that is shifted or of another size of file, compressed,
# a few bytes now and then for ever, and the whole file.
FAULTS = ("429", "500", "drop", "short", "long", "shifted", "total", "gzip", "slow", "whole")
TOKEN = "hf_letmein"
READ_ONLY_TOKEN = "hf_readonly"

INFO = re.compile(r"/api/models/(?P<repo>[^/]+(?:/(?!revision/)[^/]+)?)(?:/revision/(?P<rev>[^/]+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")
PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)")
COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)")
LFS_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
CDN = re.compile(r"/cdn/(?P<oid>[0-9a-f]{64})")
LFS_PUT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")


class Request(NamedTuple):
    method: str
    path: str
    sent: int


@dataclass
class Repo:
    """A repository: its commits by hash, its branches, and who may see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


class HubServer:
    """The server and its switches. Use it as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.fail_with: int | None = None  # answer everything with this status
        self.hang_up_after: int | None = None  # send so many bytes of a file's body, then close the connection
        self.stall_after: int | None = None  # send so many bytes of a file's body, then no more
        self.ignore_range = False
        self.hide_commit = False  # answer like something that is no Hub
        self.use_cdn = False  # redirect weights to another host, as the Hub does; it must not see the token
        self.away = False  # redirect every GET, and take every upload of a large file, at another name of this host
        self.repeats_token = False  # put the token into the message of a refusal
        self.leaks: list[str] = []  # what was asked for with a token at another name of this host
        self.signed_for: int | None = None  # so many answers come from an address of that host, then 403
        self.faults: list[str] = []  # each range of weights that is asked for takes the first of FAULTS; "" is none
        self.limit_headers = {"RateLimit": '"resolvers";r=0;t=0'}  # of the fault 429: a second, for one is added
        self.pause = 0.0  # seconds before each range of weights
        self.ranges: list[tuple[int, int]] = []  # the ranges of weights that were asked for
        self.renamed: dict[str, str] = {}  # old id to new: redirected, as the Hub does
        self.blobs: dict[str, bytes] = {}
        self.signatures: dict[str, int] = {}  # of addresses of the other host: how many answers they still give
        self.closing = threading.Event()
        self._http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def commit(self, repo_id: str, files: Mapping[str, bytes], *, ref: str = "main", **access: bool) -> str:
        """Make `files` the newest commit of `ref`, and return its hash."""
        repo = self.repos.setdefault(repo_id, Repo(**access))
        sha = hashlib.sha1(f"{repo_id}{len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = dict(files)
        repo.refs[ref] = sha
        return sha

    def fetched(self) -> dict[str, int]:
        """Return the body bytes sent for each file that was asked for with GET."""
        sent: dict[str, int] = {}
        for method, path, size in self.requests:
            if method == "GET" and (match := RESOLVE.fullmatch(path)):
                sent[match["file"]] = sent.get(match["file"], 0) + size
        return sent

    def sent_of_weights(self) -> int:
        """Return the body bytes sent of weights, from both hosts."""
        return sum(sent for _, path, sent in self.requests if path.endswith(".safetensors") or CDN.fullmatch(path))


@cache
def oid_of(content: bytes) -> str:
    """Return the SHA-256 of a file, computed once."""
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may stop reading whenever it likes
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        route = RESOLVE.fullmatch(path) or INFO.fullmatch(path)
        if path == "/api/agent-harnesses":  # huggingface_hub's telemetry, once a day
            self.reply(404, record=False)
        elif self.hub.fail_with:
            self.fail()
        elif self.hub.away and self.headers["Host"].startswith("127.0.0.1"):
            self.reply(307, headers={"Location": self.elsewhere() + self.path})
        elif match := CDN.fullmatch(path):
            assert "Authorization" not in self.headers
            if self.is_signed():
                self.send_file(self.hub.blobs[match["oid"]], {}, is_weights=True)
            else:
                self.reply(403, {"error": "expired"})
        elif route and route["repo"] in self.hub.renamed:
            location = self.path.replace(route["repo"], self.hub.renamed[route["repo"]], 1)
            self.reply(307, headers={"Location": location})
        elif match := RESOLVE.fullmatch(path):
            self.resolve(match["repo"], match["rev"], match["file"])
        elif match := INFO.fullmatch(path):
            self.describe(match["repo"], match["rev"] or "main")
        else:
            self.refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        body = self.body()
        match = LFS_PUT.fullmatch(self.path)
        assert match
        assert hashlib.sha256(body).hexdigest() == match["oid"]
        self.hub.blobs[match["oid"]] = body
        self.reply(200)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        if self.hub.fail_with:
            self.fail()
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif self.token() not in (TOKEN, READ_ONLY_TOKEN):
            self.reply(401, {"error": "Invalid username or password."})
        elif self.token() == READ_ONLY_TOKEN:
            self.reply(403, {"error": "You don't have the rights to create or change this model"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif PREUPLOAD.fullmatch(path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.reply(200, {"files": files})
        elif LFS_BATCH.fullmatch(path):
            objects = json.loads(body)["objects"]
            for item in objects:
                place = self.elsewhere() if self.hub.away else self.hub.endpoint
                item["actions"] = {"upload": {"href": f"{place}/lfs/{item['oid']}"}}
            self.reply(200, {"objects": objects, "transfer": "basic"})
        elif match := COMMIT.fullmatch(path):
            self.add_commit(match["repo"], body)
        else:
            self.refuse(404, "EntryNotFound")

    def add_commit(self, repo_id: str, ndjson: bytes) -> None:
        files = {}
        for line in map(json.loads, ndjson.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = self.hub.commit(repo_id, files)
        self.reply(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})

    def create(self, wanted: dict[str, Any]) -> None:
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.commit(repo_id, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        self.reply(409 if exists else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and its files, or refuse as the Hub does and return None."""
        if self.token() not in (None, TOKEN, READ_ONLY_TOKEN):
            self.refuse(401, "", message="Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token() is None):
            self.refuse(401 if self.token() is None else 404, "RepoNotFound")
            return None
        is_file = "/resolve/" in self.path
        if repo.gated and is_file:
            self.refuse(401 if self.token() is None else 403, "GatedRepo", message="Access is restricted")
            return None
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    def describe(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            sha, files = found
            siblings = [{"rfilename": name} for name in files]
            private = self.hub.repos[repo_id].private
            self.reply(200, {"id": repo_id, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def resolve(self, repo_id: str, revision: str, file: str) -> None:
        if not (found := self.find(repo_id, revision)):
            return
        sha, files = found
        headers = {} if self.hub.hide_commit else {"X-Repo-Commit": sha}
        if file not in files:
            self.refuse(404, "EntryNotFound", headers=headers)
            return
        content = files[file]
        oid = oid_of(content)
        if self.hub.use_cdn and file.endswith(".safetensors"):
            self.hub.blobs[oid] = content
            signature = str(len(self.hub.signatures))
            self.hub.signatures[signature] = self.hub.signed_for or 0
            location = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{oid}?signature={signature}"
            linked = {"Location": location, "X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self.reply(302, headers=headers | linked)
        else:
            headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
            self.send_file(content, headers, is_weights=file.endswith(".safetensors"))

    def is_signed(self) -> bool:
        """Return whether the address is still good, and count this answer."""
        signature = urlsplit(self.path).query.removeprefix("signature=")
        self.hub.signatures[signature] -= 1
        return self.hub.signed_for is None or self.hub.signatures[signature] >= 0

    def send_file(self, content: bytes, headers: dict[str, str], *, is_weights: bool = False) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = len(content)
        if is_weights and asked and self.command == "GET":
            span = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            self.hub.ranges.append(span)
            self.hub.closing.wait(self.hub.pause)
            with suppress(IndexError):  # of an empty list; two threads take two faults
                if fault := self.hub.faults.pop(0):
                    self.send_faulty(fault, content, *span)
                    return
        if not asked or self.hub.ignore_range:
            self.reply(200, content, headers)
        elif int(asked[1]) >= size:
            self.reply(416, headers=headers | {"Content-Range": f"bytes */{size}"})
        else:
            start, end = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            self.reply(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"})

    def fail(self) -> None:
        repeated = f"no: {self.headers.get('Authorization')}" if self.hub.repeats_token else ""
        self.reply(self.hub.fail_with or 500, headers={"X-Error-Message": repeated} if repeated else None)

    def elsewhere(self) -> str:
        return self.hub.endpoint.replace("127.0.0.1", "localhost")

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if parsed and "Authorization" in self.headers and self.headers.get("Host", "").startswith("localhost"):
            self.hub.leaks.append(self.path)
        return parsed

    def send_faulty(self, fault: str, content: bytes, start: int, end: int) -> None:
        """Answer a range in one of the wrong ways of FAULTS."""
        body, shown = content[start:end], f"bytes {start}-{end - 1}/{len(content)}"
        if fault == "429":
            self.reply(429, headers=self.hub.limit_headers)
        elif fault == "500":
            self.reply(500)
        elif fault == "whole":
            self.reply(200, content)
        elif fault == "short":
            self.reply(206, body[:-10], {"Content-Range": shown})
        elif fault == "shifted":
            self.reply(
                206, content[start + 4 : end + 4], {"Content-Range": f"bytes {start + 4}-{end + 3}/{len(content)}"}
            )
        elif fault == "total":
            self.reply(206, body, {"Content-Range": f"bytes {start}-{end - 1}/{len(content) + 1}"})
        elif fault == "gzip":
            self.reply(206, gzip.compress(body, 1), {"Content-Range": shown, "Content-Encoding": "gzip"})
        elif fault == "flipped":  # wrong bytes in the form of right ones: only the hash of the whole file tells
            self.reply(206, bytes([body[0] ^ 1]) + body[1:], {"Content-Range": shown})
        elif fault == "drop":
            self.stream(shown, [body[: len(body) // 2]], length=len(body))
        elif fault == "long":
            self.stream(shown, [b"wrong" + body], length=None)
        else:
            assert fault == "slow"
            self.stream(shown, [body[at : at + 16] for at in range(0, len(body), 16)], length=len(body), pause=0.05)

    def stream(self, shown: str, pieces: list[bytes], *, length: int | None, pause: float = 0.0) -> None:
        """Send a range piece by piece, and close the connection."""
        self.send_response(206)
        self.send_header("Content-Range", shown)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        try:
            for piece in pieces:
                self.wfile.write(piece)
                sent += len(piece)
                if pause and self.hub.closing.wait(pause):
                    return
        finally:
            self.close_connection = True
            self.hub.requests.append(Request(self.command, unquote(urlsplit(self.path).path), sent))

    def refuse(self, status: int, code: str, *, message: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, headers={**(headers or {}), "X-Error-Code": code, "X-Error-Message": message or code})

    def reply(
        self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None, *, record: bool = True
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        part = b"" if self.command == "HEAD" else raw
        if RESOLVE.fullmatch(self.path) or "/cdn/" in self.path:
            part = part[: self.hub.hang_up_after][: self.hub.stall_after]
        if record:  # before the client can see the end of the answer, which to HEAD is that of the headers
            self.hub.requests.append(Request(self.command, unquote(urlsplit(self.path).path), len(part)))
        self.end_headers()
        self.wfile.write(part)
        if self.command != "HEAD" and len(part) < len(raw):
            self.close_connection = True
            if self.hub.stall_after is not None:
                self.hub.closing.wait()

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None
