"""Object stores of our own on loopback, in this process: moto's S3, gcp-storage-emulator's GCS. `trouble` makes them
answer with an error instead, as a store does that is overloaded, or does not let one in."""

import contextlib
import functools
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from http import server
from typing import Any

Trouble = Callable[[str, str], "tuple[int, str] | None"]
"""(method, path) -> (HTTP status, S3's name of the error), or None: it is carried out."""

ACCESS = "key:secret"
BUCKET = "bucket"
PAGE = 100  # keys in an answer of S3 to a listing: fewer than its 1,000, so that tests need not make as many


def missing(kind: str) -> str:
    """Why there can be no such store here; empty: there can."""
    needed = {"s3": ("moto", "flask", "flask_cors"), "gcs": ("gcp_storage_emulator",)}[kind]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"there is no {kind} store without {', '.join(absent)}: see requirements.txt" if absent else ""


class ObjectStore:
    """A running server of one kind, with one bucket.

    Attributes:
        trouble: asked before every request, in the server's threads.
        requests: how many there were.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.trouble: Trouble | None = None
        self.requests = 0
        self._server = _s3(self) if kind == "s3" else _gcs(self)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def uri(self, root: str, more: str = "", host: str = "127.0.0.1", port: int = 0, scheme: str = "http") -> str:
        """URI of a store below `root`; `port`: of something in between."""
        at = f"scheme={scheme}&endpoint_override={host}:{port or self.port}{more}"
        if self.kind == "s3":
            return f"s3://{ACCESS}@{BUCKET}/{root}?region=us-east-1&{at}"
        return f"gs://anonymous@{BUCKET}/{root}?{at}"

    @contextlib.contextmanager
    def in_trouble(self, trouble: Trouble) -> Iterator[None]:
        self.trouble = trouble
        try:
            yield
        finally:
            self.trouble = None

    def asked(self, method: str, path: str) -> tuple[int, str] | None:
        """A request came in."""
        self.requests += 1
        return self.trouble(method, path) if self.trouble is not None else None

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _s3(store: ObjectStore) -> Any:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    moto = DomainDispatcherApplication(create_backend_app)

    class KeepingConnections(MotoRequestHandler):  # type: ignore[misc,valid-type]
        protocol_version = "HTTP/1.1"

    def answer(environ: Any, start: Any) -> Any:
        wrong = store.asked(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if wrong is None:
            if "list-type" in environ["QUERY_STRING"]:
                environ["QUERY_STRING"] = re.sub(r"max-keys=\d+", f"max-keys={PAGE}", environ["QUERY_STRING"])
            return moto(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        text = f"<?xml version='1.0'?><Error><Code>{wrong[1]}</Code><Message>as the test wants</Message></Error>"
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else text.encode()
        start(f"{wrong[0]} trouble", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    made = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=KeepingConnections)
    made.daemon_threads = True
    _make_bucket(made.server_address[1])
    return made


def _make_bucket(port: int) -> None:
    """In moto's own books: no request is needed, and no client."""
    from moto.backends import get_backend
    from moto.core import DEFAULT_ACCOUNT_ID

    backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    if BUCKET not in backend.buckets:
        backend.create_bucket(BUCKET, "us-east-1")


def _gcs(store: ObjectStore) -> Any:
    import logging

    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    held = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, held)

    class Troubled(RequestHandler):  # type: ignore[misc]
        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            wrong = store.asked(self.command, self.path)
            if wrong is None:
                return True
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(wrong[0])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False

        def log_message(self, *_: Any) -> None:
            pass

    made = server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Troubled, held))
    made.daemon_threads = True
    return made
