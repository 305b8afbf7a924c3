"""--cross-job-timeout-s bounds silence, missing resources and stopped progress, never work.

`Passing` stands in for the way to the broker: it asks a real ledger, and lets time pass where that has no answer yet.
While time passes, clients that live give signs of life.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from slime.cross_job import deadline as deadlines
from slime.cross_job.client import connection, session
from slime.cross_job.client.consumer import Consumer
from slime.cross_job.client.producer import Producer
from slime.cross_job.deadline import Deadline
from slime.cross_job.errors import HeldBack, PeerFailed, StoreUnreachable, WaitTimeout
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.state import DEAD, PAUSED
from slime.cross_job.ledger.verdicts import patience_left_s
from slime.cross_job.settings import Settings
from tests.support.attached import attached
from tests.support.ledger import Clock, attach, publish

LIMIT_S, WORK_S = 30.0, 45.0


class Passing:
    """See the module.

    Attributes:
        at_work: clients that live -> for how long each has only waited, as it says; None: as long as time passes.
        then: what happens at which time, once.
    """

    def __init__(self, ledger: Ledger, clock: Clock):
        self.ledger, self.clock = ledger, clock
        self.lives: dict[str, float | None] = {}
        self.then: list[tuple[float, Callable[[], Any]]] = []
        self.began = clock.now

    def passes(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        for name, waits_s in self.lives.items():
            self.ledger.heartbeat(name, "busy", (), self.clock.now - self.began if waits_s is None else waits_s)
        self.ledger.membership.tick()
        for client in self.ledger.membership.silent(2.0):
            self.ledger.membership.vouch(client)
        for when, act in [*self.then]:
            if self.clock.now >= self.began + when:
                self.then.remove((when, act))
                act()

    def check_process(self) -> None:
        """It is the process that attached."""

    def call(self, operation: str, *args: Any, deadline: Any = None, **kwargs: Any) -> Any:
        return getattr(self.ledger, operation)(*args, **kwargs)

    def wait(self, deadline: Deadline, operation: str, *args: Any, **kwargs: Any) -> Any:
        while (found := self.call(operation, *args, **kwargs)) is None and deadline:
            self.passes()
            assert self.clock.now < self.began + 10_000, "nothing ends this wait"
        return found

    def open_refs(self, payload: Any, suffix: str = "", deadline: Any = None) -> list[Any]:
        return [payload.token]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (connection, deadlines, session):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made, time=made, sleep=lambda s: None))
    return made


@pytest.fixture
def way(clock: Clock) -> Passing:
    ledger = Ledger(clock, wall=clock)
    for name in ("p", "c"):
        attach(ledger, name)
    return Passing(ledger, clock)


def client(kind: type, name: str, way: Passing, **settings: Any) -> Any:
    return attached(kind, name, way, Settings(timeout_s=LIMIT_S, **settings))


def test_a_rollout_of_any_length_is_waited_for(way):
    way.ledger.demand("c", 0)
    assert way.ledger.next_demand("p") == 0
    way.lives, way.then = {"p": 0.0, "c": None}, [(WORK_S, lambda: publish(way.ledger, 0))]
    assert client(Consumer, "c", way).claim(0).rollout_id == 0
    assert way.clock.now >= way.began + WORK_S, "the witness: it took longer than the limit"


def test_a_training_step_of_any_length_is_waited_for(way):
    way.lives, way.then = {"p": None, "c": 0.0}, [(WORK_S, lambda: way.ledger.demand("c", 1))]
    assert client(Producer, "p", way).next_demand() == 1


def test_weights_wait_for_a_generation_of_any_length(way):
    ledger = way.ledger
    gate = ledger.jobs["exp"].gate
    way.lives = {"p": 0.0, "c": None}
    ledger.announce("p", ["engines"])
    ledger.next_demand("p", gated=True)
    gate.generating = 0
    way.then = [(WORK_S, lambda: setattr(gate, "generating", None))]
    assert client(Consumer, "c", way).begin_update() == 1
    assert way.clock.now >= way.began + WORK_S


@pytest.mark.parametrize("ask", ["producer_facts", "loaded"])
def test_a_rollout_job_may_take_any_time_to_start(way, monkeypatch, ask):
    monkeypatch.setattr(session, "get", lambda ref, *_: ref)
    way.lives, answers = {"p": 0.0, "c": None}, []
    operation = "facts" if ask == "producer_facts" else ask
    monkeypatch.setattr(way.ledger, operation, lambda *_, **__: answers[0] if answers else None)
    way.then = [(WORK_S, lambda: answers.append((1, ["said"])))]
    assert getattr(client(Consumer, "c", way), ask)()[0] == 1


def test_silence_ends_a_wait_after_the_limit_counted_from_the_last_sign_of_life(way):
    way.lives = {"p": 0.0, "c": None}
    way.then = [(100.0, lambda: way.lives.pop("p"))]
    way.ledger.clients["p"].dead_after_s = 10.0
    with pytest.raises(WaitTimeout, match="silent, not dead") as caught:
        client(Consumer, "c", way).claim(0)
    assert 30 <= caught.value.verdict["silent_s"] < 32
    assert 130 <= way.clock.now - way.began < 135


def test_a_short_silence_at_the_limit_ends_nothing(way):
    way.ledger.clients["p"].dead_after_s = 10.0
    way.lives = {"p": 0.0, "c": None}
    way.then = [(15.0, lambda: way.lives.pop("p")), (36.0, lambda: publish(way.ledger, 0))]
    assert client(Consumer, "c", way).claim(0).rollout_id == 0


def test_where_everybody_only_waits_a_wait_ends_and_says_so(way):
    way.lives = {"p": None, "c": None}
    words = "no rollout was demanded yet.*every client of the job only waits"
    with pytest.raises(WaitTimeout, match=words):
        client(Consumer, "c", way).claim()
    assert LIMIT_S <= way.clock.now - way.began < LIMIT_S + 5


def test_a_reader_waits_as_long_as_the_train_job_is_at_work(way):
    attach(way.ledger, "c-archive", group="archive")
    way.lives = {"p": None, "c": 0.0, "c-archive": None}
    way.then = [(WORK_S, lambda: publish(way.ledger, 0))]
    assert client(Consumer, "c-archive", way).claim().rollout_id == 0


def test_a_paused_job_is_waited_for_and_one_that_is_full_only_while_somebody_works(way):
    job = way.ledger.jobs["exp"]
    way.lives, job.control = {"p": None, "c": None}, PAUSED
    way.then = [(WORK_S, lambda: setattr(job, "control", "running")), (WORK_S, lambda: publish(way.ledger, 0))]
    consumer = client(Consumer, "c", way)
    assert consumer.claim(0).rollout_id == 0
    job.max_bytes = 15
    way.lives["c"] = 0.0  # its driver trains, while this thread waits
    way.then = [(way.clock.now - way.began + WORK_S, lambda: way.lives.update(c=None))]
    before = way.clock.now
    with pytest.raises(HeldBack, match="the producer waits for room"):
        consumer.claim(1)
    assert way.clock.now >= before + WORK_S


def test_a_peer_that_failed_is_waited_for_within_its_grace_alone(way):
    way.lives = {"c": None}
    way.ledger.end("p", DEAD, "killed")
    with pytest.raises(PeerFailed):
        client(Consumer, "c", way, peer_grace_s=60.0).claim(0)
    assert 60 <= way.clock.now - way.began < 65


def test_what_the_caller_allows_bounds_work_too(way):
    way.lives = {"p": 0.0, "c": None}
    with pytest.raises(WaitTimeout, match="still at work"):
        client(Consumer, "c", way).claim(0, timeout_s=10)
    assert 10 <= way.clock.now - way.began < 12


def test_who_waits_in_one_thread_and_works_in_another_is_at_work(way):
    consumer = client(Consumer, "c", way)
    consumer._waits[object()] = way.clock.now - 50
    assert consumer._waits_s() == 50
    consumer.working(True)
    assert consumer._waits_s() == 0


class Vault:
    """Stands in for a vault that answers with what it waits for, and after `until` with what was published."""

    def __init__(self, way: Passing, says: str, until: float):
        self.way, self.says, self.until, self.asked = way, says, until, 0
        self.hand_over = SimpleNamespace(remote=self._hand_over)

    def _hand_over(self, target: Any, source: Any, slice_s: float) -> Any:
        assert slice_s > 0, "it is asked without a pause"
        self.asked += 1
        self.way.passes(slice_s)
        return {"published": 0} if self.way.clock.now >= self.way.began + self.until else self.says


@pytest.fixture
def handed_over(way, monkeypatch) -> Callable[..., Any]:
    def made(says: str, until: float, **settings: Any) -> Any:
        vault = Vault(way, says, until)
        monkeypatch.setattr(way, "vault_on", lambda *_: vault, raising=False)
        monkeypatch.setattr(way, "get_of_vault", lambda ref, *_: ref, raising=False)
        producer = client(Producer, "p", way, **settings)
        producer._nodes = {}
        monkeypatch.setattr(producer, "_node_of", lambda *_: "n")
        monkeypatch.setattr(producer, "_publish", lambda rollout_id, source, node_id, timeout_s, repeatable: (
            producer._hand_over(SimpleNamespace(), source, node_id, timeout_s, f"rollout {rollout_id}", repeatable)
        ))  # fmt: skip
        monkeypatch.setattr(
            "slime.cross_job.client.producer.ray", SimpleNamespace(actor=SimpleNamespace(ActorHandle=object))
        )
        return producer.publish_from(0, SimpleNamespace(generate=SimpleNamespace(remote=None)), "generate")

    return made


def test_a_method_that_generates_may_take_any_time(handed_over, way):
    assert handed_over("", WORK_S) == {"published": 0}
    assert way.clock.now >= way.began + WORK_S


def test_the_bound_on_one_rollout_is_a_flag_of_its_own(handed_over, way):
    with pytest.raises(WaitTimeout, match=r"rollout 0 .* within 40 s: its producer's method still runs"):
        handed_over("", WORK_S, rollout_timeout_s=40.0)


def test_a_store_that_is_away_ends_a_publish_after_the_limit(handed_over, way):
    with pytest.raises(StoreUnreachable, match="the store is away"):
        handed_over("the store is away", 1e9)
    assert LIMIT_S <= way.clock.now - way.began < LIMIT_S + 5


@pytest.mark.parametrize("dies", [False, True])
def test_an_evaluation_may_take_any_time_while_its_job_lives(way, monkeypatch, dies):
    way.ledger.clients["p"].dead_after_s = 10.0
    way.lives = {"p": 0.0, "c": 0.0}
    if dies:
        way.then = [(5.0, lambda: way.lives.pop("p"))]

    def wait(refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        way.passes(max(timeout, 0.1))
        return (refs, []) if way.clock.now > way.began + WORK_S else ([], refs)

    monkeypatch.setattr(session, "ray", SimpleNamespace(wait=wait))
    monkeypatch.setattr(session, "get", lambda ref, *_: ref)
    consumer = client(Consumer, "c", way)
    if not dies:
        assert consumer.answer("figures", "eval") == "figures"
        assert way.clock.now > way.began + WORK_S
    else:
        with pytest.raises(WaitTimeout, match=r"no answer to eval of job exp .*silent, not dead"):
            consumer.answer("figures", "eval")


@pytest.mark.parametrize(
    ("kind", "silent_s", "stalled_s", "left_s"),
    [
        ("alive", 1.0, 0.0, 29.0),
        ("slow", 6.0, 0.0, 24.0),
        ("alive", 1.0, 31.0, -1.0),
        ("full", 1.0, 31.0, -1.0),
        ("paused", 1.0, 99.0, 29.0),
        ("silent", 31.0, 0.0, -1.0),
        ("dead", 80.0, 0.0, 10.0),
        ("absent", 0.0, 0.0, 0.0),
    ],
)
def test_how_long_a_wait_goes_on(kind, silent_s, stalled_s, left_s):
    said = {"kind": kind, "silent_s": silent_s, "stalled_s": stalled_s}
    assert patience_left_s(said, 30.0, 60.0) == left_s


def test_a_deadline_that_was_ended_is_not_renewed(clock):
    deadline = Deadline(5.0, bounds_silence=True)
    deadline.end()
    deadline.renew(9.0)
    assert not deadline
    assert Deadline(math.inf).left() == math.inf
