"""How long tests wait: as long as something moves, and longer on a slow or busy machine.

Seconds in tests are those of a quiet machine. `patient` makes them those of this one. A limit that is a claim of the
pages ("within 5 s") is multiplied, too: on the quiet machine it is the claim.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

WINDOWS = 3
"""So many times what is allowed for silence may pass in all: what says every second that it waits does not move."""
_QUIET_S = 0.027  # what the work of `_seconds` takes on the quiet machine
_MOST = 10.0


def patient(seconds: float) -> float:
    """As long as these seconds are on the quiet machine: more on this one, where it is slower or has other work."""
    return seconds * max(_slower(0), _slower(int(time.monotonic() / 10)))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes less than these seconds of the quiet machine."""
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    assert took_s < patient(seconds), f"it took {took_s:.1f} s"


@functools.lru_cache(maxsize=2)
def _slower(when: int) -> float:
    return min(_MOST, max(1.0, _seconds() / _QUIET_S))


def _seconds() -> float:
    began, total = time.perf_counter(), 0
    for number in range(300_000):
        total += number * number % 7
    return time.perf_counter() - began


def wait_for(
    condition: Callable[[], Any],
    silence_s: float,
    why: Callable[[], str] = str,
    moves: Callable[[], object] | None = None,
) -> Any:
    """Wait until `condition` returns something true, and return that.

    Args:
        silence_s: fail after so many seconds of the quiet machine, if `moves` still returns the same.
        why: for the message.
        moves: returns what changes while there is progress.
    """
    last = moves() if moves else None
    allowed_s = patient(silence_s)
    deadline = time.monotonic() + allowed_s
    end = deadline + (WINDOWS - 1) * allowed_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            before, last = last, moves() if moves else None
            assert last != before, f"nothing moved for {allowed_s:.0f} s: {why()}"
            assert time.monotonic() < end, f"not within {WINDOWS * allowed_s:.0f} s: {why()}"
            deadline = min(end, time.monotonic() + allowed_s)
        time.sleep(0.1)
    return found
