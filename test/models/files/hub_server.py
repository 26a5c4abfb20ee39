"""A small stand-in of the Hugging Face hub on the loopback interface, for models and data sets."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_of_the_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories under owner/name, by the routes that huggingface_hub asks for.

    Attributes:
        downloaded: "owner/name/file" of what was asked for, each time.
        gated: names of repositories that are not to be had without the token.
        failing: names of files that end in a server's error.
    """

    def __init__(self, models: dict[str, Path] | None = None, datasets: dict[str, Path] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {("models", "", name): folder for name, folder in (models or {}).items()}
        self.repositories |= {("datasets", "datasets/", name): folder for name, folder in (datasets or {}).items()}
        self.downloaded: list[str] = []
        self.gated: set[str] = set()
        self.failing: set[str] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0].strip("/"))
        if path == "stop":
            self._send(b"", {})
            threading.Thread(target=lambda: (self.server.shutdown(), self.server.server_close())).start()
            return
        for (kind, prefix, name), folder in self.server.repositories.items():
            files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
            api, resolve = f"api/{kind}/{name}", f"{prefix}{name}/resolve/"
            if not path.startswith((api, resolve)):
                continue
            if name in self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._refuse(403, "GatedRepo")
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": file} for file in files]
                self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {})
            elif path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": at.stat().st_size, "oid": _etag(at)}
                    for file, at in files.items()
                ]
                self._send(json.dumps(tree).encode(), {})
            else:
                self._file(name, path.removeprefix(resolve).partition("/")[2], files, with_body)
            return
        self._refuse(404, "RepoNotFound")

    def _file(self, name: str, file: str, files: dict[str, Path], with_body: bool) -> None:
        if file not in files:
            self._refuse(404, "EntryNotFound")
            return
        if with_body:
            self.server.downloaded.append(f"{name}/{file}")
            if file in self.server.failing:
                self._refuse(400, "")
                return
        headers = {"ETag": f'"{_etag(files[file])}"', "X-Repo-Commit": COMMIT}
        self._send(files[file].read_bytes(), headers, with_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
