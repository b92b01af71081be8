"""A small server with the HTTP API of the Hub, so that tests use the real client without a network.

It has models, data sets and spaces, with commits, branches, large files, private repositories and range requests. It
can be set to fail. The client needs the environment variables HF_ENDPOINT (the server's address), HF_TOKEN=hf_local
and HF_HUB_DISABLE_XET=1.
"""

import base64
import datetime
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


USER, TOKEN = "user", "hf_local"
LARGE_SUFFIXES = (".safetensors", ".parquet", ".bin", ".arrow", ".pt")
LARGE_BYTES = 1_000_000
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether it was uploaded to the store for large files."""

    data: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_oid


@dataclass
class Repository:
    """A repository with its commits and branches."""

    kind: str  # "model", "dataset" or "space"
    name: str
    private: bool
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)  # commit -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch -> commit

    def commit(self, branch: str, tree: dict[str, Blob], title: str) -> str:
        """Make a tree the new state of a branch; return the name of the commit."""
        # Other contents give another name. Otherwise the client could take files of an earlier test from its cache.
        contents = sorted((path, blob.git_oid) for path, blob in tree.items())
        facts = f"{self.kind} {self.name} {len(self.trees)} {title} {contents}"
        sha = hashlib.sha1(facts.encode()).hexdigest()
        self.trees[sha], self.refs[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch or commit name; None if there is no such revision."""
        revision = unquote(revision).removeprefix("refs/heads/")
        return self.refs.get(revision) or (revision if revision in self.trees else None)


class Refusal(Exception):
    """An error response with an error code that the client knows."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


class LocalHub(ThreadingHTTPServer):
    """A server on the loopback interface.

    Attributes:
        url: Its address.
        repositories: (kind, name) -> repository.
        large: SHA-256 -> content of the uploaded large files.
        requests: Method and path of every request.
        failures: Part of a path -> status of the response to requests for such paths. Status 0 closes the connection
            without a response.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.requests: list[str] = []
        self.failures: dict[str, int] = {}

    def start(self) -> "LocalHub":
        """Serve in a background thread; return the server."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def create(self, kind: str, name: str, private: bool = False) -> Repository:
        """Add a repository with one commit."""
        repository = self.repositories[kind, name] = Repository(kind, name, private)
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        return repository


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *args):
        pass

    def answer(self):
        """Answer a request of any method, or fail if its path is in `failures` of the server."""
        url = urlsplit(self.path)
        self.query, body = parse_qs(url.query), self.read_body()
        self.server.requests.append(f"{self.command} {url.path}")
        with self.server.lock:
            try:
                for part, status in self.server.failures.items():
                    if part in url.path and not status:
                        self.close_connection = True
                        return
                    if part in url.path:
                        raise Refusal(status, "Failure", "You are not allowed to do this")
                self.route(url.path, body)
            except Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
                self.send(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None):
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, content):
        self.send(json.dumps(content).encode())

    @property
    def is_known(self) -> bool:
        """Whether the request has the user's token."""
        return self.headers.get("Authorization", "") == f"Bearer {TOKEN}"

    def find(self, kind: str, name: str) -> Repository:
        """Return a repository; refuse if it does not exist, or is private and the request has no token."""
        repository = self.server.repositories.get((kind, name))
        if repository is None or (repository.private and not self.is_known):
            raise Refusal(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
        return repository

    def route(self, path: str, body: bytes):
        """Call the method for a path."""
        writes = self.command in ("POST", "PUT", "DELETE") and "paths-info" not in path
        if writes and not path.startswith(("/large/", "/api/validate-yaml")) and not self.is_known:
            raise Refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if not self.is_known:
                raise Refusal(401, "Unauthorized")
            token = {"accessToken": {"role": "write", "displayName": "test"}}
            self.send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": token})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create_repository(json.loads(body))
        elif match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise Refusal(400, "BadHash")
            self.server.large[match[1]] = body
            self.send_json({})
        elif re.fullmatch(r"/(?:datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self.offer_large_uploads(json.loads(body))
        elif match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(self.find(match[1] or "model", match[2]), match[3], unquote(match[4]))
        elif match := re.fullmatch(
            r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path
        ):
            self.repository_api(
                self.find(match[1], match[2]), match[3], match[4] or "main", unquote(match[5] or ""), body
            )
        else:
            raise Refusal(404, "NotFound", path)

    def address(self, kind: str, name: str) -> str:
        return f"{self.server.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"

    def create_repository(self, wanted: dict):
        kind, name = wanted.get("type", "model"), f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = self.address(kind, name)
        if (kind, name) in self.server.repositories:
            self.send(json.dumps({"error": "You already created this repo", "url": url}).encode(), 409)
            return
        self.server.create(kind, name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.send_json({"url": url, "name": name, "id": name})

    def offer_large_uploads(self, wanted: dict):
        """Return upload addresses for the large files that are not stored yet."""
        objects = []
        for entry in wanted["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.server.large else entry | {"actions": upload})
        self.send_json({"transfer": "basic", "objects": objects})

    def repository_api(self, repository: Repository, verb: str | None, revision: str, path: str, body: bytes):
        if verb == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in repository.refs.items()
            ]
            return self.send_json({"branches": branches, "converts": [], "tags": []})
        if verb == "preupload":
            return self.send_json({"files": [self.upload_mode(entry) for entry in json.loads(body)["files"]]})
        if verb == "branch":
            if unquote(revision) in repository.refs:
                raise Refusal(409, "Conflict", "Reference already exists")
            repository.refs[unquote(revision)] = repository.refs["main"]
            return self.send_json({})
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree = repository.trees[sha]
        if verb == "commit":
            return self.send_json(self.commit(repository, unquote(revision), tree, sha, body))
        if verb in (None, "revision"):
            return self.send_json(self.facts(repository, sha, tree))
        if verb == "tree":
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return self.send_json(listing(tree, path, recursive))
        if verb == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self.send_json([entry(wanted, tree[wanted]) for wanted in paths if wanted in tree])
        raise Refusal(404, "NotFound", str(verb))

    def upload_mode(self, wanted: dict) -> dict:
        """Tell the client whether a file is uploaded as a large file."""
        is_large = wanted["path"].endswith(LARGE_SUFFIXES) or wanted["size"] > LARGE_BYTES
        mode = "lfs" if is_large else "regular"
        return {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def commit(self, repository: Repository, branch: str, tree: dict[str, Blob], parent: str, body: bytes) -> dict:
        tree, title = dict(tree), ""
        for line in body.splitlines():
            if not line.strip():
                continue
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refusal(412, "PreconditionFailed", "A commit has happened since")
            elif key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Refusal(400, "MissingLargeFile")
                tree[value["path"]] = Blob(self.server.large[value["oid"]], is_large=True)
            elif key == "deletedFile":
                tree.pop(value["path"], None)
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                tree = {name: blob for name, blob in tree.items() if not name.startswith(prefix)}
        sha = repository.commit(branch, tree, title)
        url = f"{self.address(repository.kind, repository.name)}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def facts(self, repository: Repository, sha: str, tree: dict[str, Blob]) -> dict:
        """Return the description of a repository at a commit."""
        date = START.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        siblings = [{"rfilename": name} for name in sorted(tree)]
        if "blobs" in self.query:
            siblings = [{"rfilename": n, "size": len(b.data), "blobId": b.git_oid} for n, b in sorted(tree.items())]
        facts = {"_id": "0", "id": repository.name, "modelId": repository.name, "author": USER, "sha": sha}
        facts |= {"lastModified": date, "createdAt": date, "private": repository.private, "gated": False}
        facts |= {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings, "cardData": {}}
        return facts | ({"config": {}} if repository.kind == "model" else {})

    def send_file(self, repository: Repository, revision: str, path: str):
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        blob = repository.trees[sha].get(path)
        headers = {"X-Repo-Commit": sha, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        if blob is None:
            self.send(b'{"error": "Entry not found"}', 404, headers)
            return
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        if blob.is_large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(blob.data) - 1), len(blob.data) - 1)
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(blob.data)}"}
            self.send(blob.data[first : last + 1], 206, headers)
        else:
            self.send(blob.data, 200, headers)


def entry(path: str, blob: Blob) -> dict:
    """Return the entry of a file."""
    found = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
    if blob.is_large:
        found["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return found


def listing(tree: dict[str, Blob], path: str, recursive: bool) -> list[dict]:
    """Return the entries of the files and folders in a folder."""
    prefix = f"{path.strip('/')}/" if path.strip("/") else ""
    files, folders = [], set()
    for name, blob in sorted(tree.items()):
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        depth = len(parts) if recursive else min(2, len(parts))
        folders |= {prefix + "/".join(parts[:n]) for n in range(1, depth)}
        if recursive or len(parts) == 1:
            files.append(entry(name, blob))
    if prefix and not files and not folders:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    oids = {name: hashlib.sha1(name.encode()).hexdigest() for name in folders}
    return [{"type": "directory", "path": name, "oid": oids[name], "size": 0} for name in sorted(folders)] + files
