"""A web server of shards on the loopback interface that also fails, stalls and cuts short when it is told to."""

import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer(ThreadingHTTPServer):
    """Serves a folder's files.

    Attributes:
        faults: by file name, what the next answers do, one each: a status, or ("cut" or "stall", after so many bytes).
        broken: as a fault that never ends, by file name.
        ranges: whether it knows them.
        moved: where an answer sends on to, by file name.
        asked: how often for each file.
        authorization: what was sent as such.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, ranges: bool = True, host: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list] = {}
        self.broken: dict[str, object] = {}
        self.moved: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.authorization: set[str | None] = set()
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fault(self, name: str) -> object:
        """What the next answer for a file does, None for nothing."""
        waiting = self.faults.get(name)
        return waiting.pop(0) if waiting else self.broken.get(name)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def log_message(self, *_) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        self.server.asked[name] += 1
        self.server.authorization.add(self.headers.get("Authorization"))
        if name in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[name])
            self.end_headers()
            return
        file, fault = self.server.folder / name, self.server.fault(name)
        if isinstance(fault, int) or not file.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content, start = file.read_bytes(), 0
        asked = self.headers.get("Range")
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        what, after = fault if isinstance(fault, tuple) else ("", len(content))
        try:
            self.wfile.write(content[start : start + after])
            self.wfile.flush()
            if what == "stall":
                time.sleep(1.5)
        except OSError:
            pass  # the client has gone
        self.close_connection = True
