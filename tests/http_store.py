"""An HTTP server that serves a folder, notes what it is asked for, and fails on request."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Store:
    """faults: for a path what to do at its next requests, one each, then it is served:

    a status as 500; "reset" in the middle; "short", the connection closed after half; "stall", nothing more after
    half; "wrong", one byte changed; "whole", whatever range is asked for; "page", HTML with status 200; ("to", URL), a
    redirect.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.answers: dict[str, object] = {}  # the JSON that is answered to paths that begin so
        self.faults: dict[str, list] = {}
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].lstrip("/")
            store.asked.append(path)
            store.tokens.append(self.headers.get("Authorization"))
            for start, values in store.answers.items():
                if path.startswith(start):
                    return self._answer(200, json.dumps(values).encode(), **{"Content-Type": "application/json"})
            faults = store.faults.get(path, [])
            fault = faults.pop(0) if faults else None
            file = store.folder / path
            if isinstance(fault, tuple) and fault[0] == "to":
                return self._answer(302, b"", Location=fault[1])
            if isinstance(fault, tuple):  # a status, and when to come again
                return self._answer(fault[0], b"", **{"Retry-After": str(fault[1])})
            if isinstance(fault, int) or not file.is_file():
                return self._answer(fault or 404, b"no")
            data = b"<!DOCTYPE html><p>proxy" if fault == "page" else file.read_bytes()
            status, asked = 200, self.headers.get("Range")
            if asked and fault != "whole":
                first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
                status, data = 206, data[first : last + 1]
            if fault == "wrong":
                data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
            self._answer(status, data, only=len(data) // 2 if fault in ("reset", "short", "stall") else None)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            if fault == "stall":
                store.released.wait(30)
            if fault in ("reset", "short", "stall"):
                self.close_connection = True

        def _answer(self, status: int, data: bytes, only: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:only])
                self.wfile.flush()

    return Handler
