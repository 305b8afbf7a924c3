"""How long one waits for a place on the cluster, and what is said meanwhile; what Ray tells of it: integration."""

import time

import pytest

from slime.cross_job.client import placement, shutdown
from slime.cross_job.client.placement import Limits, Shortage
from slime.cross_job.errors import NoResources, Stopped
from slime.cross_job.settings import Settings

HOPELESS, BUSY = Shortage("no GPUs at all", True), Shortage("others hold the GPUs", False)


@pytest.fixture
def limits(monkeypatch, clock):
    monkeypatch.setattr(placement.time, "monotonic", clock)
    said: list[str] = []
    made = Limits(Settings(resources_s=10, timeout_s=100), said.append)
    made.said = said
    return made


@pytest.mark.parametrize(("found", "limit_s"), [(HOPELESS, 10), (BUSY, 100)])
def test_a_wait_for_a_place_has_an_end(limits, clock, found, limit_s):
    for _ in range(limit_s + 1):
        limits.check(found)
        clock.now += 1
    with pytest.raises(NoResources, match=f"nothing was started within {limit_s} s: {found.message}"):
        limits.check(found)


def test_what_was_missing_and_has_come_begins_anew(limits, clock):
    limits.check(HOPELESS)
    clock.now += 9
    limits.check(None)
    clock.now += 9
    limits.check(HOPELESS)


def test_what_is_missing_is_said_each_time_and_logged_once_a_minute(limits, clock, caplog):
    for _ in range(65):
        limits.check(BUSY)
        clock.now += 1
    assert len(limits.said) == 65
    assert len(caplog.records) == 2


def test_another_shortage_has_a_limit_of_its_own(limits, clock):
    """Others held the GPUs for long, then a node dies and is being replaced; or the engines are started."""
    for _ in range(99):
        limits.check(BUSY)
        clock.now += 1
    for found in (HOPELESS, Shortage("no CPU for the engines", False, "engines")):
        for _ in range(10):
            limits.check(found)
            clock.now += 1


def test_what_has_come_is_said_once(limits):
    for found in (BUSY, None, None):
        limits.check(found)
    assert limits.said == [BUSY.message, "starting"]


def test_a_wish_to_stop_is_heard_while_one_waits(monkeypatch):
    monkeypatch.setattr(placement, "shortage", lambda: BUSY)
    given_up: list[Exception] = []
    watch = placement.Watch(Settings(), lambda text: None, given_up.append)
    shutdown.requested.set()
    try:
        deadline = time.monotonic() + 5
        while not given_up and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        shutdown.requested.clear()
        watch.stop()
    assert [type(error) for error in given_up] == [Stopped]
