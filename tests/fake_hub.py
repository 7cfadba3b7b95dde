"""The part of the hub's HTTP interface that an upload calls."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Repositories in memory: `private` by name, `files` by (name, branch, path). An
    upload needs `token`; with `denied`, nobody may write."""

    token, denied = "a-token", False

    def __init__(self, address):
        self.address = address
        self.private, self.files, self.objects = {}, {}, {}

    def answer(self, method, path, body, authorization):
        """Status and JSON of the answer to a request."""
        if path.startswith("/objects/"):  # what git LFS stores, under an address of its own
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {}
        if method == "POST" and self.denied:
            return 403, {"error": "You don't have the rights to write."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.address}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        _, _, _, user, name, *rest = path.split("/")
        repo, (kind, branch) = f"{user}/{name}", (rest or ("info", None))[:2]
        if repo not in self.private:
            return 404, {"error": "Repository not found"}
        if kind == "info":
            return 200, {"id": repo, "private": self.private[repo]}
        if kind == "branch":
            return 200, {}
        if kind == "tree":
            kept = [path for r, b, path in self.files if (r, b) == (repo, branch)]
            return 200, [{"type": "file", "path": path, "oid": "0", "size": 1} for path in kept]
        if kind == "preupload":
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": p, "uploadMode": mode[p.endswith(".safetensors")], "shouldIgnore": False}
                for p in (each["path"] for each in json.loads(body)["files"])
            ]
            return 200, {"files": files}
        assert kind == "commit", path
        for line in map(json.loads, body.splitlines()):
            self._apply(repo, branch, line["key"], line["value"])
        address = f"{self.address}/{repo}/commit/{'0' * 40}"
        return 200, {"success": True, "commitUrl": address, "commitOid": "0" * 40}

    def _create(self, given):
        name = f"{given['organization']}/{given['name']}"
        if name in self.private:
            return 409, {"error": "It exists.", "url": f"{self.address}/{name}"}
        self.private[name] = given.get("private") is True or given.get("visibility") == "private"
        return 200, {"url": f"{self.address}/{name}"}

    def _apply(self, repo, branch, key, value):
        if key == "deletedFile":
            del self.files[repo, branch, value["path"]]
        elif key == "file":
            self.files[repo, branch, value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[repo, branch, value["path"]] = self.objects[value["oid"]]


@contextlib.contextmanager
def fake_hub():
    """A `FakeHub` that answers on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, value = hub.answer(self.command, path, body, self.headers["Authorization"])
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
