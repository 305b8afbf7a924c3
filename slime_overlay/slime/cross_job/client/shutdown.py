"""SIGTERM as a wish: finish what is out, publish or take nothing new, end with exit code 0. Ray's `job stop` sends it.

A job that waits ends at once; one that generates or trains ends when it would wait next. Ray kills a driver 3 s after
SIGTERM unless the cluster was started with a longer RAY_JOB_STOP_WAIT_TIME_S; what is then unfinished is not lost
either: it is generated, or trained on, by the job that is started next.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import Stopped

logger = logging.getLogger(__name__)

requested = threading.Event()
"""Set once this process was asked to stop."""

_wanted = False
_waiting = False
_then: Callable[[], object] | None = None


def want(then: Callable[[], object] | None = None) -> None:
    """From the next `install` on, SIGTERM is a wish; `then` is called when it comes."""
    global _wanted, _then
    _wanted, _then = True, then


def wanted() -> bool:
    """Whether this process is a job of ours, whose end is ours to decide."""
    return _wanted


def install() -> None:
    """Take SIGTERM over, if that is wanted. Ray takes it whenever it starts, so this comes after `ray.init`."""
    if _wanted and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)


def check() -> None:
    """Raises Stopped if this process was asked to stop."""
    if requested.is_set():
        raise Stopped(
            "this job was asked to stop (SIGTERM): what it had finished is safe, and it may be started again"
        )


@contextmanager
def while_waiting() -> Iterator[None]:
    """In this block a wish to stop raises Stopped at once (in the main thread)."""
    global _waiting
    check()
    main = threading.current_thread() is threading.main_thread()
    if main:
        _waiting = True
    try:
        yield
    except Exception:
        check()  # Ray wraps what a signal handler raises inside of it
        raise
    finally:
        if main:
            _waiting = False


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if not requested.is_set():
        logger.warning("asked to stop (SIGTERM): finishing what was begun")
        requested.set()
        if _then is not None:
            _then()
    if _waiting:
        check()
