"""The live view: a small web server that shows the jobs of a namespace, on loopback unless told otherwise.

    GET  /                page (page.py); /?token=TOKEN lets a browser in, once; the token says what it may do
    GET  /api/look        ?job=&run=&since=&events_since=   what is new, see feed.Copy.body, and how old it is
    GET  /api/rollout     ?job=&id=                         status.rollout_detail
    GET  /api/samples     ?job=&id=&first=&count=&version=  preview.preview
    POST /api/control     {"job", "action", "rollout_id", "group", "same_prompts"}, only with `allow_control`

- All who look cost the broker one question a second (feed.py); a rollout's details and samples are asked for on a
  click, a few at a time. Nothing waits without a deadline.
- Read-only unless started with `allow_control`, and then for who has the control token. Access: access.py.
- Errors are {"error": words, "kind": class of errors.py}.
"""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from ..errors import BadInput, CrossJobError, Refused, RolloutNotFound, Unreachable, WaitTimeout
from ..ledger.state import DRAINING, PAUSED, RUNNING
from ..types import check_job_id, shortened
from .access import CONTROL, CONTROL_TOKEN, VIEW_TOKEN, Door, check_origin, host_is_ours, needs_token
from .feed import Feed, View
from .page import live_page, to_json

logger = logging.getLogger(__name__)

ACTIONS = ("pause", "resume", "drain", "requeue", "discard")
MOST_SAMPLES = 16
"""Samples of one answer."""

_CONTROLS = {"pause": PAUSED, "resume": RUNNING, "drain": DRAINING}
_AT_ONCE = 4  # questions on a click that are under way
_QUEUED = 32  # of them that wait
_FIRST_S = 4.0  # for the first answer of the broker, before somebody who looks is told that there is none yet
_CLICK_S = 40.0  # for a question on a click
_START_S = 20.0
_STATUS = ((BadInput, 400), (RolloutNotFound, 404), (Refused, 403), (WaitTimeout, 504), (Unreachable, 503))
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebView:
    """The server, in a thread of its own: `with WebView(factory) as view: print(view.url)`.

    Args:
        viewer_factory: makes a viewer.Viewer; called by a thread of the server, again when the broker is lost.
        port: 0 is a free one.
        allow_control: let who has the control token pause, drain, requeue and discard.
        view_token: asked of who looks (None: nobody is asked).
        control_token: asked of who steers (None: nobody who may look is asked; only without a `view_token`).
        job_id: the job that is shown to who names none.
        poll_s: how often the broker is asked, in seconds.
        allowed_hosts: names by which browsers may reach it, besides IP addresses, localhost and this host.

    Raises:
        BadInput: the port is taken, the host is no address, a token is missing (where others reach the host, or Ray
            asks for one), or both tokens are the same.
    """

    def __init__(
        self,
        viewer_factory: Callable[[], View],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        allow_control: bool = False,
        view_token: str | None = None,
        control_token: str | None = None,
        job_id: str | None = None,
        poll_s: float = 1.0,
        allowed_hosts: Sequence[str] = (),
    ):
        if view_token is None and needs_token(host):
            raise BadInput(
                f"others may reach {host or 'every address'}, or Ray asks for a token: the view needs one of its own "
                f"({VIEW_TOKEN}); or listen on 127.0.0.1 of a machine of yours, and use an ssh tunnel"
            )
        if allow_control and view_token is not None and control_token is None:
            raise BadInput(f"steering needs a token of its own, besides that of who looks ({CONTROL_TOKEN})")
        if view_token is not None and view_token == control_token:
            raise BadInput("the view token would also steer: give the view and the control token different values")
        if not poll_s >= 0.05:
            raise BadInput(f"a question every {poll_s} s is too much for a broker: at least 0.05 s")
        self.job_id = None if job_id is None else check_job_id(job_id)
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._host, self._control = host, allow_control
        self._names = [host, socket.gethostname(), *allowed_hosts]
        self._door = Door(view_token, control_token if allow_control else None, self.port)
        self._feed = Feed(viewer_factory, self.job_id, poll_s)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cross-job-web")
        self._asked = 0  # questions on a click that did not end yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready, self._ended = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="cross-job-web", daemon=True)

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host = self._host if self._host not in ("", "0.0.0.0", "::") else "127.0.0.1"
        return f"http://[{host}]:{self.port}/" if ":" in host else f"http://{host}:{self.port}/"

    def start(self) -> "WebView":
        self._feed.start()
        self._thread.start()
        if not self._ready.wait(_START_S) or self._failure is not None:
            self.stop()
            raise Unreachable(f"the web server did not start: {self._failure or f'not within {_START_S:.0f} s'}")
        logger.info("web view at %s%s", self.url, "" if self._control else ", read-only")
        return self

    def stop(self) -> None:
        """End; twice is once."""
        self._ended.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it ended by itself
                self._loop.call_soon_threadsafe(lambda: None)
        if self._thread.is_alive():
            self._thread.join(10)
        self._feed.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._socket.close()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within `timeout_s` seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> "WebView":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------ the server's thread

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = web.Application(middlewares=[self._guard], client_max_size=16 * 1024)
        app.router.add_get("/", self._page)
        app.router.add_get("/api/look", self._look)
        app.router.add_get("/api/rollout", self._rollout)
        app.router.add_get("/api/samples", self._samples)
        app.router.add_post("/api/control", self._steer)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket).start()
            self._ready.set()
            while not self._ended.is_set():
                await asyncio.sleep(0.2)
        finally:
            await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets in who may come in, and turns errors into words."""
        response: web.StreamResponse
        try:
            if not host_is_ours(request.headers.get("Host", ""), self._names):
                raise Refused(
                    "this server is not known by that name (Host): use its IP address or localhost, or start it with "
                    "that name as an allowed host"
                )
            entering = request.path == "/" and "token" in request.query
            if not (request.path == "/" and request.method == "GET"):  # a link from elsewhere may lead to the page
                check_origin(request.headers)
            if not entering and not self._door.admits(request.headers, request.cookies):
                words = "a token is asked for: open /?token=TOKEN once, or send `Authorization: Bearer TOKEN`"
                response = _failed(words, "Refused", 401)
                response.headers["WWW-Authenticate"] = "Bearer"
            else:
                response = await handler(request)
        except CrossJobError as error:
            status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
            response = _failed(str(error), type(error).__name__, status)
        except web.HTTPException as error:
            response = _failed(error.reason, "BadInput", error.status)
        except Exception as error:
            logger.exception("request for %s", request.path)
            response = _failed(f"{type(error).__name__}: {error}", type(error).__name__, 500)
        response.headers.update(_HEADERS)
        return response

    async def _page(self, request: web.Request) -> web.StreamResponse:
        if "token" in request.query:
            level = self._door.level_of(request.query["token"])
            if not level:
                return _failed("that is no token of this view", "Refused", 401)
            job = request.query.get("job")
            target = f"/?job={check_job_id(job)}" if job else "/"
            response = web.Response(status=303, headers={"Location": target})
            value = self._door.cookie_value(level)
            response.set_cookie(self._door.cookie, value, httponly=True, samesite="Strict", path="/")
            return response
        page = live_page()
        return web.Response(text=page.html, content_type="text/html", headers={"Content-Security-Policy": page.policy})

    async def _look(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        job, run = query.get("job") or None, query.get("run", "")
        since, events_since = _number(query, "since", -1), _number(query, "events_since", 0)
        deadline = asyncio.get_running_loop().time() + _FIRST_S
        while True:
            name = self._feed.want(job)
            late = asyncio.get_running_loop().time() > deadline
            if late or not self._feed.is_cold(name):
                body = self._feed.answer(name, run, since, events_since)
                if body is not None:
                    break
                if late:
                    raise Unreachable("the broker has not answered yet: it is asked again every second")
            await asyncio.sleep(0.05)
        response = _json(f'{{"allow_control":{to_json(self._steers(request))},{body[1:]}')
        if len(body) > 8192:
            response.enable_compression()
        return response

    async def _rollout(self, request: web.Request) -> web.StreamResponse:
        job, rollout_id = self._job(request.query), _number(request.query, "id", None)
        return _json(to_json(await self._ask(lambda viewer: viewer.detail(job, rollout_id))))

    async def _samples(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        job, rollout_id = self._job(query), _number(query, "id", None)
        version = _number(query, "version", None) if query.get("version") else None
        first, count = max(0, _number(query, "first", 0)), _number(query, "count", 3)
        count = max(1, min(MOST_SAMPLES, count))
        found = await self._ask(lambda viewer: viewer.samples(job, rollout_id, version, first=first, count=count))
        text = await asyncio.get_running_loop().run_in_executor(None, to_json, found)
        response = _json(text)
        response.enable_compression()
        return response

    async def _steer(self, request: web.Request) -> web.StreamResponse:
        if not self._control:
            raise Refused("this view is read-only: start it with --allow-control to steer a job from here")
        if not self._steers(request):
            raise Refused("your token is for looking: open /?token=CONTROL-TOKEN once to steer a job from here")
        if request.content_type != "application/json":
            raise BadInput(f"a body of type application/json is wanted, this is {request.content_type}")
        try:
            wish = json.loads(await request.text())
        except ValueError:
            raise BadInput("the body is no JSON") from None
        action = wish.get("action") if isinstance(wish, dict) else None
        if action not in ACTIONS:
            raise BadInput(f"action {action!r} is none of {', '.join(ACTIONS)}")
        job = check_job_id(wish.get("job"))
        if action in _CONTROLS:
            said = await self._ask(lambda viewer: viewer.steer("control", job, _CONTROLS[action]))
        else:
            rollout_id = wish.get("rollout_id")
            extra = str(wish.get("group") or "train") if action == "requeue" else bool(wish.get("same_prompts"))
            said = await self._ask(lambda viewer: viewer.steer(action, job, rollout_id, extra))
        logger.info("from the web view of %s: %s of job %s", request.remote, action, job)
        return _json(to_json({"action": action, "said": said}))

    def _steers(self, request: web.Request) -> bool:
        return self._control and self._door.admits(request.headers, request.cookies) == CONTROL

    def _job(self, query: Any) -> str:
        job = query.get("job") or self._feed.want(None)
        return check_job_id(job)

    async def _ask(self, question: Callable[[View], Any]) -> Any:
        """The answer of a viewer, within a deadline. Raises what the viewer does, Unreachable, WaitTimeout."""
        if self._asked >= _AT_ONCE + _QUEUED:
            raise Unreachable("too many questions are under way: try again in a few seconds")
        viewer = self._feed.viewer()
        self._asked += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, question, viewer)
        future.add_done_callback(self._answered)
        try:
            return await asyncio.wait_for(asyncio.shield(future), _CLICK_S)
        except asyncio.TimeoutError:
            late = f"no answer within {_CLICK_S:.0f} s: the broker or the vault may be busy or gone"
            raise WaitTimeout(late) from None

    def _answered(self, future: "asyncio.Future[Any]") -> None:
        self._asked -= 1
        if not future.cancelled():
            future.exception()  # so that nobody calls it forgotten


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises BadInput."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        raise BadInput(
            f"cannot listen at {host or 'every address'}, port {port} ({error}): stop what has it, or choose another "
            "(--port; 0 is a free one)"
        ) from None
    return listening


def _number(query: Any, name: str, default: int | None) -> int:
    """A whole number of the query. Raises BadInput."""
    text = query.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text)[:20])
    except ValueError:
        raise BadInput(f"{name}={text!r}: a whole number is wanted") from None


def _json(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="application/json")


def _failed(words: str, kind: str, status: int) -> web.Response:
    return _json(to_json({"error": shortened(words, 4000), "kind": kind}), status)
