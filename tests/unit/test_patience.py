"""What bounds the waits of the tests: silence, not work."""

import types

import pytest

from tests.support import patience
from tests.support.patience import WINDOWS, wait_for, within


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves where somebody sleeps, on a machine twice as slow as the quiet one."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(patience, "_slower", lambda when: 2.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(patience, "time", types.SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def test_what_is_so_is_returned(clock):
    assert wait_for(lambda: clock.now > 105 and "found", 10.0) == "found"


@pytest.mark.parametrize("moves", [None, lambda: "the same"])
def test_silence_ends_later_on_a_slow_machine(clock, moves):
    with pytest.raises(AssertionError, match="nothing moved for 20 s: its log"):
        wait_for(lambda: False, 10.0, lambda: "its log", moves)
    assert 120 < clock.now < 121


def test_work_may_take_longer_than_silence(clock):
    assert wait_for(lambda: clock.now > 145, 10.0, moves=lambda: clock.now)


def test_what_says_for_ever_that_it_waits_ends_too(clock):
    with pytest.raises(AssertionError, match="not within 60 s"):
        wait_for(lambda: False, 10.0, moves=lambda: clock.now)
    assert clock.now < 100 + WINDOWS * 20 + 1


def test_what_takes_longer_than_it_may_is_said(clock):
    with within(5.0):
        patience.time.sleep(9.0)
    with pytest.raises(AssertionError, match=r"it took 11\.0 s"), within(5.0):
        patience.time.sleep(11.0)


def test_the_quiet_machine_is_not_given_less():
    assert patience.patient(5.0) >= 5.0
