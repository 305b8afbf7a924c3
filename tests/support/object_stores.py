"""Object stores of our own on loopback, in this process. S3 is moto's server. GCS is a stand-in for its XML API, which
is that of S3 with other names of headers: moto's server behind a translation (gcp-storage-emulator has neither the XML
API's listings and deletions nor any condition of a request).

Between moto's look at a condition and its writing another thread may write: so requests that write are carried out one
after the other here.

`trouble` makes them answer with an error instead, as a store does that is overloaded or does not let one in, or breaks
the connection in the middle of the answer."""

import contextlib
import importlib.util
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Trouble = Callable[[str, str], "tuple[int, str] | None"]
"""(method, path) -> (HTTP status, S3's name of the error), or None: it is carried out; CUT: and then its answer breaks
off, that to a GET in the middle."""

CUT = (0, "")
ACCESS = "key:secret"
BUCKET = "bucket"
PAGE = (
    100  # keys in an answer to a listing: fewer than the 1,000 of the real ones, so that tests need not make as many
)


def missing(kind: str) -> str:
    """Why there can be no such store here; empty: there can."""
    absent = [name for name in ("moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
    return f"there is no {kind} store without {', '.join(absent)}: see requirements.txt" if absent else ""


class ObjectStore:
    """A running server of one kind, with one bucket.

    Attributes:
        trouble: asked before every request, in the server's threads.
        requests: how many there were.
        ignores_conditions: as servers do that know no conditional requests.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.trouble: Trouble | None = None
        self.requests = 0
        self.ignores_conditions = False
        self._server = _server(self)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def uri(self, root: str, more: str = "", host: str = "127.0.0.1", port: int = 0, scheme: str = "http") -> str:
        """URI of a store below `root`; `port`: of something in between."""
        at = f"{scheme}://{host}:{port or self.port}{more}"
        if self.kind == "s3":
            return f"s3://{ACCESS}@{BUCKET}/{root}?region=us-east-1&endpoint={at}"
        return f"gs://{BUCKET}/{root}?bearer_token=secret&base_url={at}"

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


def _server(store: ObjectStore) -> Any:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    moto = DomainDispatcherApplication(create_backend_app)
    writing = threading.Lock()

    class KeepingConnections(MotoRequestHandler):  # type: ignore[misc,valid-type]
        protocol_version = "HTTP/1.1"

    def answer(environ: Any, start: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        wrong = store.asked(method, environ["PATH_INFO"])
        if wrong is None or wrong == CUT:
            if "list-type" in environ["QUERY_STRING"]:
                environ["QUERY_STRING"] += f"&max-keys={PAGE}"
            if store.ignores_conditions:
                environ.pop("HTTP_IF_NONE_MATCH", None)
            with contextlib.nullcontext() if method in ("GET", "HEAD") else writing:
                found = b"".join((moto if store.kind == "s3" else as_gcs)(environ, start))
            return [found] if wrong is None else _broken(found, method, environ["werkzeug.socket"])
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        text = f"<?xml version='1.0'?><Error><Code>{wrong[1]}</Code><Message>as the test wants</Message></Error>"
        body = b"" if method == "HEAD" else text.encode()
        start(f"{wrong[0]} trouble", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def as_gcs(environ: Any, start: Any) -> Iterable[bytes]:
        """The stand-in for GCS: a condition, metadata, and that it says of a deletion that nothing was there."""
        if environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", "") == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        for name in [name for name in environ if name.startswith("HTTP_X_GOOG_META_")]:
            environ[name.replace("GOOG", "AMZ")] = environ.pop(name)
        if environ["REQUEST_METHOD"] == "DELETE":
            status: list[str] = []
            b"".join(moto({**environ, "REQUEST_METHOD": "HEAD"}, lambda line, _: status.append(line)))
            if status[0].startswith("404"):
                start(status[0], [("Content-Length", "0")])
                return [b""]

        def translated(line: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start(line, [(k.lower().replace("x-amz-meta-", "x-goog-meta-"), v) for k, v in headers], *error)

        found: Iterable[bytes] = moto(environ, translated)
        return found

    made = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=KeepingConnections)
    made.daemon_threads = True
    _make_bucket()
    return made


def _broken(answer: bytes, method: str, connection: socket.socket) -> Iterator[bytes]:
    if method == "GET":
        yield answer[: len(answer) // 2]
    connection.shutdown(socket.SHUT_RDWR)
    yield answer[len(answer) // 2 :]


def _make_bucket() -> None:
    """In moto's own memory: no request is needed, and no client."""
    from moto.backends import get_backend
    from moto.core import DEFAULT_ACCOUNT_ID

    backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    if BUCKET not in backend.buckets:
        backend.create_bucket(BUCKET, "us-east-1")
