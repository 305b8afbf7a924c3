"""Deadlines of waits, and the pauses between two tries."""

import time


class Deadline:
    """A point on the monotonic clock, `timeout_s` seconds from now; that of `other` while that is later.

    Args:
        bounds_silence: it bounds silence, not work: whoever waits renews it while the other side is heard and at work.
    """

    def __init__(self, timeout_s: float, other: "Deadline | None" = None, bounds_silence: bool = False):
        self.timeout_s = max(timeout_s, other.left() if other else 0.0)
        self.bounds_silence = bounds_silence
        self._at, self._other = time.monotonic() + timeout_s, other
        self._pause_s = 0.0  # the last one

    def left(self) -> float:
        """Seconds left, never negative."""
        left_s = max(0.0, self._at - time.monotonic())
        return left_s if self._other is None else max(left_s, self._other.left())

    def __bool__(self) -> bool:
        return self.left() > 0

    def end(self) -> None:
        """Let it pass now: who waits until then gives up at the next look."""
        self._at, self.bounds_silence = time.monotonic(), False

    def renew(self, left_s: float) -> None:
        """It passes `left_s` seconds from now. Nothing happens after `end`, and where it bounds work."""
        if self.bounds_silence:
            self._at = time.monotonic() + left_s

    def pause(self, first_s: float = 0.1, longest_s: float = 1.0) -> None:
        """Sleep before the next try: `first_s`, then each time twice as long, up to `longest_s`; never beyond it."""
        self._pause_s = min(2 * self._pause_s, longest_s) if self._pause_s else first_s
        time.sleep(min(self._pause_s, self.left()))
