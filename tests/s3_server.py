"""An S3 server in this process (moto, behind werkzeug), with what real ones do: answers late, breaks off, goes away."""

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

BUCKET = "s3://bucket"


class Store:
    """`environment` is what its clients need; `seen` lists (method, key) of all requests; `before(method, key)` is
    called, and may wait, before a request is answered."""

    def __init__(self):
        pytest.importorskip("s3fs", reason="not run: needs s3fs, in the extra dev")
        pytest.importorskip("moto", reason="not run: needs moto, in the extra dev")
        pytest.importorskip("flask_cors", reason="not run: needs flask-cors, in the extra dev")
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.app = DomainDispatcherApplication(create_backend_app)
        self.seen: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, key: None
        self.port, self.gone = 0, False
        self.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # of botocore; s3fs and partial_fc.storage try again as well
        }

    def __call__(self, environ, start_response):
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.seen.append((method, key))
        self.before(method, key)
        if self.gone:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return self.app(environ, start_response)

    def start(self) -> None:
        from moto.moto_server.threaded_moto_server import MotoRequestHandler
        from werkzeug.serving import make_server

        self.gone = False
        self.server = make_server("127.0.0.1", self.port, self, True, request_handler=MotoRequestHandler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """No connection is taken any more, and those that there are break off."""
        self.gone = True
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def s3():
    """A Store with one bucket; this process's environment leads to it."""
    store = Store()
    before = dict(os.environ)
    os.environ.update(store.environment)
    import fsspec

    files = fsspec.get_filesystem_class("s3")
    files.clear_instance_cache()  # those of another module's store
    with suppress(FileExistsError):  # all stores of a process hold the same
        files().mkdir("bucket")
    yield store
    store.stop()
    files.clear_instance_cache()
    os.environ.clear()
    os.environ.update(before)
