"""The driver of slime's train job, as far as it needs neither slime nor Ray."""

import math
from types import SimpleNamespace

import pytest
import ray

from slime.cross_job.errors import WaitTimeout
from slime.cross_job.settings import Settings


@pytest.fixture
def side(train_driver, monkeypatch):
    made = train_driver.TrainDriver.__new__(train_driver.TrainDriver)
    made.steps = []
    made.settings, made.gateway, made.given_s = Settings(timeout_s=3600.0), Gateway(), []
    monkeypatch.setattr(train_driver, "get", lambda ref, deadline, what: made.given_s.append(deadline.timeout_s))
    return made


class Gateway:
    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: method)


@pytest.mark.parametrize("method", ["start", "saved", "end_update", "break_update"])
def test_the_gateway_may_wait_for_a_silent_broker_and_say_which(side, method):
    side.ask(method)
    assert side.given_s[0] > side.settings.timeout_s


def test_a_call_that_waits_for_the_rollout_job_waits_as_long_as_that_works(side):
    side.ask("begin_update", wait=True)
    assert side.given_s == [math.inf]


@pytest.mark.parametrize(
    ("error", "while_training"),
    [
        (None, False),
        (ray.exceptions.RayTaskError("train", "", ValueError("a poisoned rollout")), True),
        (ray.exceptions.RayError("The actor died: SIGSEGV"), True),
        (ray.exceptions.RayError("The actor died because its node has died. Node Id: 233e"), False),
        (WaitTimeout("the training ranks did not answer within 1 s"), False),  # under way: something else failed
    ],
)
def test_a_lost_node_is_no_word_against_the_rollout(side, train_driver, monkeypatch, error, while_training):
    told = []
    side.gateway = SimpleNamespace(fail=SimpleNamespace(remote=lambda *said: told.append(said)))
    monkeypatch.setattr(train_driver.ray, "is_initialized", lambda: True)

    def get(ref, deadline, what):
        if ref is side.steps and error is not None:
            raise error

    monkeypatch.setattr(train_driver, "get", get)
    side.args, side.trained, side.ended = SimpleNamespace(num_rollout=2), 0, False
    side._end("it failed", False)
    assert told == [("it failed", while_training)]


def test_after_the_last_rollout_the_broker_is_told_as_long_as_it_takes(side, train_driver, monkeypatch):
    monkeypatch.setattr(train_driver.ray, "is_initialized", lambda: True)
    side.args, side.trained = SimpleNamespace(num_rollout=2), 1
    for reason, through, given_s in (("", True, 3630.0), ("ValueError", False, 30.0)):
        side.ended = False
        side._end(reason, through)
        assert side.given_s.pop() == given_s


def test_a_span_is_with_the_gateway_before_slime_asks_for_the_next(side, train_driver, monkeypatch):
    """slime ends its run with a call to the gateway, whose threads took it up before the last weight update's span."""
    did = []
    monkeypatch.setattr(train_driver.ray, "wait", lambda refs, timeout: did.append(("taken", refs)))
    side.gateway = SimpleNamespace(add_span=SimpleNamespace(remote=lambda *span: did.append(("told", span)) or span))
    side.settings = Settings(traces="on")
    side.add_span("weights", 4, 1.0, 2.0)
    assert did == [("told", ("weights", 4, 1.0, 2.0)), ("taken", [("weights", 4, 1.0, 2.0)])]
    side.settings = Settings()
    side.add_span("weights", 5, 1.0, 2.0)
    assert len(did) == 2, "where traces are off, none is told"
