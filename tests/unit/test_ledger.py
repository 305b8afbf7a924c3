"""The ledger, without Ray and with a clock that the test moves."""

import pickle

import pytest

from slime.cross_job.errors import (
    BadInput,
    BrokerLost,
    EndOfStream,
    Fenced,
    JobIdTaken,
    NotOwner,
    PeerFailed,
    Refused,
    RolloutNotFound,
)
from slime.cross_job.ledger import Ledger
from slime.cross_job.records import ANSWERS
from slime.cross_job.types import ClientInfo, Payload


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(clock):
    return Ledger(clock, wall=clock)


def attach(ledger, role, name=None, *, job="exp", ray_job=None, group="train", **settings):
    name = name or role
    group = group if role == "consumer" else ""
    info = ClientInfo(name, job, role, group=group, ray_job_id=ray_job or f"ray-{name}", pid=42, host="h")
    ledger.attach(info, **settings)
    return name


def payload(token, nbytes=10, **facts):
    return Payload(token, "vault", nbytes, num_samples=2, **facts)


def publish(ledger, producer, rollout_id, token=None, **facts):
    return ledger.publish(producer, rollout_id, payload(token or f"t{rollout_id}", **facts))[1]


@pytest.fixture
def pair(ledger):
    return attach(ledger, "producer"), attach(ledger, "consumer")


def test_a_rollout_goes_from_demand_to_ack_and_is_freed(ledger, pair):
    producer, consumer = pair
    assert ledger.next_demand(producer) is None
    ledger.demand(consumer, 0)
    assert ledger.next_demand(producer) == 0
    assert ledger.claim(consumer, 0) is None
    publish(ledger, producer, 0)
    located = ledger.claim(consumer, 0)
    assert (located.rollout_id, located.version, located.payload.token) == (0, 1, "t0")
    assert ledger.take_drops() == []
    ledger.ack(consumer, 0)
    assert ledger.take_drops() == [("vault", "t0")]
    assert ledger.take_drops() == []
    with pytest.raises(RolloutNotFound, match="acked"):
        ledger.claim(consumer, 0)
    with pytest.raises(RolloutNotFound, match="freed"):
        ledger.demand(consumer, 0)
    with pytest.raises(Refused, match="freed"):
        publish(ledger, producer, 0, "again")


def test_claiming_again_is_the_same_lease_and_acking_twice_is_once(ledger, pair):
    producer, consumer = pair
    publish(ledger, producer, 0)
    assert ledger.claim(consumer, 0) == ledger.claim(consumer, 0)
    ledger.ack(consumer, 0)
    ledger.ack(consumer, 0)
    status = ledger.status("exp")["exp"]
    assert (status["claimed"], status["acked"], status["freed"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("max_ahead", "allowed"), [(0, []), (1, [4]), (3, [4, 5, 6])], ids=["train.py", "train_async.py", "three"]
)
def test_the_producer_goes_ahead_as_far_as_allowed(ledger, max_ahead, allowed):
    producer, consumer = attach(ledger, "producer", max_ahead=max_ahead), attach(ledger, "consumer")
    ledger.demand(consumer, 3)  # a trainer that resumes: nothing before 3 is generated
    publish(ledger, producer, ledger.next_demand(producer))
    for rollout_id in allowed:
        assert ledger.next_demand(producer) == rollout_id
        publish(ledger, producer, rollout_id)
    assert ledger.next_demand(producer) is None


def test_going_ahead_before_any_demand_needs_a_start_and_stops_at_until(ledger):
    producer = attach(ledger, "producer", max_ahead=2)
    assert ledger.next_demand(producer) is None
    assert ledger.next_demand(producer, start=7) == 7
    publish(ledger, producer, 7)
    with pytest.raises(EndOfStream):
        ledger.next_demand(producer, start=7, until=8)


def test_what_was_demanded_comes_before_going_ahead(ledger):
    producer, consumer = attach(ledger, "producer", max_ahead=5), attach(ledger, "consumer")
    for rollout_id in (4, 2):
        ledger.demand(consumer, rollout_id)
    assert ledger.next_demand(producer) == 2


def test_the_same_token_is_the_same_version_and_other_content_the_next(ledger, pair):
    producer, consumer = pair
    assert publish(ledger, producer, 0, "a").version == 1
    assert publish(ledger, producer, 0, "a").version == 1
    assert publish(ledger, producer, 0, "b").version == 2
    assert ledger.claim(consumer, 0).version == 2
    assert ledger.get("exp", 0, 1).payload.token == "a"
    assert [v.version for v in ledger.versions("exp", 0)] == [1, 2]
    with pytest.raises(RolloutNotFound, match=r"versions? 1, 2, not 3"):
        ledger.get("exp", 0, 3)
    assert ledger.status("exp")["exp"]["republished"] == 1
    ledger.ack(consumer, 0)
    assert sorted(ledger.take_drops()) == [("vault", "a"), ("vault", "b")]


def test_a_retry_whose_answer_was_lost_is_once(ledger):
    producer, consumer = attach(ledger, "producer"), attach(ledger, "consumer")
    for rollout_id in range(3):
        publish(ledger, producer, rollout_id)
    first = ledger.claim(consumer, token="a")
    assert ledger.claim(consumer, token="a") == first
    assert ledger.claim(consumer, token="b").rollout_id == 1
    ledger.claim(consumer, 2)
    ledger.ack(consumer, 2)
    assert ledger.publish(producer, 2, payload("t2"))[1].version == 1  # accepted before, acked and freed since
    ledger.put_value(consumer, "k", payload("v0"))
    writer = attach(ledger, "writer")
    ledger.put_value(writer, "k", payload("v1"))
    assert ledger.put_value(consumer, "k", payload("v0")).version == 0
    assert ledger.get_value("exp", "k").payload.token == "v1"


def test_each_thread_of_a_client_may_ask_again(ledger):
    """Answers are lost in any order: one a client was remembered, and a retry got a third rollout."""
    producer, consumer = attach(ledger, "producer"), attach(ledger, "consumer")
    for rollout_id in range(5):
        publish(ledger, producer, rollout_id)
    first, second = ledger.claim(consumer, token="A"), ledger.claim(consumer, token="B")
    assert [ledger.claim(consumer, token=token) for token in "ABA"] == [first, second, first]
    assert sorted(ledger.jobs["exp"].groups["train"].leases) == [0, 1]
    ledger.release(consumer, 0, "C")
    ledger.release(consumer, 1, "D")
    assert ledger.claim(consumer, token="E").rollout_id == 0
    ledger.release(consumer, 0, "C")  # was done: what another thread claimed since stays with it
    assert [*ledger.jobs["exp"].groups["train"].leases] == [0]
    assert ledger.claim(consumer, token="A").rollout_id == 1, "its lease was over"
    ledger.vault_lost("vault")
    for rollout_id in (3, 4, 3):
        assert ledger.publish(producer, rollout_id, payload(f"t{rollout_id}"))[1].version == 1
    assert ledger.status("exp")["exp"]["published"] == 5
    for number, key in enumerate("kl"):
        ledger.put_value(consumer, key, payload(f"v{number}"))
    ledger.vault_lost("vault")
    assert [ledger.put_value(consumer, key, payload(f"v{number}")).version for number, key in enumerate("kl")] == [
        0,
        0,
    ]


def test_a_token_never_hands_out_what_another_claim_took_since(ledger):
    producer, consumer = attach(ledger, "producer"), attach(ledger, "consumer")
    publish(ledger, producer, 0)
    publish(ledger, producer, 1)
    ledger.claim(consumer, token="A")
    ledger.requeue("exp", 0)
    assert ledger.claim(consumer, token="B").rollout_id == 0
    assert ledger.claim(consumer, token="A").rollout_id == 1
    ledger.requeue("exp", 0)
    assert ledger.claim(consumer, 0, token="C").rollout_id == 0
    assert ledger.claim(consumer, token="B") is None


def test_answers_that_are_remembered_stay_small(ledger):
    """Ten megabytes of meta stayed in every snapshot until the next publish."""
    producer, consumer = attach(ledger, "producer"), attach(ledger, "consumer")
    for rollout_id in range(3 * ANSWERS):
        publish(ledger, producer, rollout_id, meta={"text": "x" * 200_000})
        ledger.put_value(consumer, "k", payload(f"v{rollout_id}"))
        ledger.claim(consumer, token=f"c{rollout_id}")
        ledger.release(consumer, rollout_id, f"r{rollout_id}")
        ledger.claim(consumer, rollout_id, token=f"c{rollout_id}")
        ledger.ack(consumer, rollout_id)
    for client in ledger.clients.values():
        assert all(len(answers) <= ANSWERS for answers in client.answered.values())
        assert len(pickle.dumps(client)) < 6000
    assert len(ledger.clients[consumer].claims) <= 1


def test_claims_that_are_over_are_not_remembered(ledger, pair):
    producer, consumer = pair
    for rollout_id in range(1000):
        publish(ledger, producer, rollout_id)
        ledger.claim(consumer, rollout_id, token=f"c{rollout_id}")
        ledger.ack(consumer, rollout_id)
    assert ledger.clients[consumer].claims == {}
    for rollout_id in range(1000, 1003):
        publish(ledger, producer, rollout_id)
        ledger.claim(consumer, rollout_id, token=f"c{rollout_id}")
    ledger.release(consumer, 1000)
    ledger.requeue("exp", 1001)
    assert [*ledger.clients[consumer].claims] == [1002]
    ledger.end(consumer, "stopped")
    assert ledger.clients[consumer].claims == {}


def test_an_answer_that_an_older_version_remembered_is_no_trouble(ledger):
    producer = attach(ledger, "producer")
    ledger.clients[producer].answered["publish"] = ("t0", None)
    assert publish(ledger, producer, 0).version == 1
    assert publish(ledger, producer, 0).version == 1


def test_what_may_be_equal_is_not_recorded_before_it_was_compared(ledger, pair):
    producer, _ = pair
    ledger.publish(producer, 0, payload("a"), compare=True)
    recorded, newest = ledger.publish(producer, 0, payload("b"), compare=True)
    assert (recorded, newest.version) == (False, 1)
    assert ledger.publish(producer, 0, payload("c", nbytes=11), compare=True)[0]
    assert ledger.publish(producer, 0, payload("d", nbytes=11, weight_version=3), compare=True)[0]


def test_a_lease_stays_with_its_version(ledger, pair):
    producer, consumer = pair
    publish(ledger, producer, 0, "a")
    assert ledger.claim(consumer, 0).version == 1
    publish(ledger, producer, 0, "b")
    assert ledger.claim(consumer, 0).version == 1
    assert ledger.get("exp", 0).version == 2


def test_within_a_group_a_rollout_has_one_owner_and_every_group_gets_all(ledger):
    producer = attach(ledger, "producer")
    first, second = attach(ledger, "consumer", "c1"), attach(ledger, "consumer", "c2")
    archive = attach(ledger, "consumer", "c3", group="archive")
    for rollout_id in range(2):
        publish(ledger, producer, rollout_id)
    assert ledger.claim(first).rollout_id == 0
    assert ledger.claim(second).rollout_id == 1
    assert ledger.claim(second, 0) is None
    assert ledger.claim(first) is None
    assert [ledger.claim(archive).rollout_id for _ in range(2)] == [0, 1]
    with pytest.raises(NotOwner, match="leased by"):
        ledger.ack(second, 0)
    with pytest.raises(NotOwner, match="claim it first"):
        ledger.ack(archive, 7)
    ledger.ack(first, 0)
    assert ledger.take_drops() == []  # the archive has not acked it
    ledger.ack(archive, 0)
    assert ledger.take_drops() == [("vault", "t0")]


def test_released_and_orphaned_rollouts_are_claimable_again(ledger, clock):
    producer = attach(ledger, "producer")
    first, second = attach(ledger, "consumer", "c1"), attach(ledger, "consumer", "c2")
    publish(ledger, producer, 0)
    ledger.claim(first)
    ledger.release(first, 0)
    assert ledger.claim(second, 0).rollout_id == 0
    clock.now += 31
    ledger.heartbeat(first, "alive")
    ledger.heartbeat(producer, "alive")
    assert [c.info.client_id for c in ledger.tick()] == [second]
    assert ledger.claim(first).rollout_id == 0
    with pytest.raises(Fenced, match=r"took what it held after 31\.0 s without a sign of life"):
        ledger.ack(second, 0)
    assert ledger.status("exp")["exp"]["requeued"] == 2


def test_a_broker_that_stood_still_counts_nobody_dead_for_what_it_did_not_hear(ledger, pair, clock):
    ledger.tick()
    clock.now += 1000
    gone = ledger.tick(stopped_s=999.0)
    assert gone == []
    for _ in range(31):
        clock.now += 1
        gone += ledger.tick()
    assert {client.info.client_id for client in gone} == {*pair}


def test_a_late_tick_by_itself_forgives_nothing(ledger, pair, clock):
    for round_s in (0.5, 5.5, 10.5, 30.5):
        clock.now += round_s
        ledger.tick()
    assert {client.state for client in ledger.clients.values()} == {"silent"}


def test_retention_keeps_the_newest_acked(ledger):
    producer, consumer = attach(ledger, "producer", retain=2), attach(ledger, "consumer")
    for rollout_id in range(4):
        publish(ledger, producer, rollout_id)
        ledger.claim(consumer, rollout_id)
        ledger.ack(consumer, rollout_id)
    assert ledger.take_drops() == [("vault", "t0"), ("vault", "t1")]
    assert [located.rollout_id for located in ledger.catalog("exp")] == [2, 3]
    assert ledger.listed("exp") == ledger.listed() == {"exp": [2, 3]}
    with pytest.raises(RolloutNotFound):
        ledger.listed("other")


def test_a_finished_producer_is_end_of_stream_and_a_failed_one_is_not(ledger, pair, clock):
    producer, consumer = pair
    publish(ledger, producer, 0)
    ledger.end(producer, "finished")
    assert ledger.claim(consumer).rollout_id == 0  # what was published is still there
    with pytest.raises(EndOfStream):
        ledger.claim(consumer, 1)
    with pytest.raises(Fenced):
        publish(ledger, producer, 1)
    other = attach(ledger, "producer", "p2")
    ledger.end(other, "failed", "ValueError: boom")
    with pytest.raises(PeerFailed, match="ValueError: boom") as raised:
        ledger.claim(consumer, 1)
    assert raised.value.verdict["kind"] == "failed"
    clock.now += 4
    assert ledger.claim(consumer, 1, grace_s=5) is None
    clock.now += 2
    with pytest.raises(PeerFailed):
        ledger.claim(consumer, 1, grace_s=5)


def test_no_end_of_stream_while_another_holds_a_lease_that_may_come_back(ledger):
    producer = attach(ledger, "producer")
    first, second = attach(ledger, "consumer", "c1"), attach(ledger, "consumer", "c2")
    publish(ledger, producer, 0)
    ledger.claim(first)
    ledger.end(producer, "finished")
    assert ledger.claim(second) is None
    ledger.end(first, "dead", "killed")
    assert ledger.claim(second).rollout_id == 0
    ledger.ack(second, 0)
    with pytest.raises(EndOfStream):
        ledger.claim(second)


def test_the_producer_learns_how_its_consumers_ended(ledger, pair):
    producer, consumer = pair
    ledger.demand(consumer, 0)
    archive = attach(ledger, "consumer", "c3", group="archive")  # has demanded nothing: it does not keep the job going
    ledger.next_demand(producer)
    publish(ledger, producer, 0)
    ledger.end(consumer, "finished")
    with pytest.raises(EndOfStream):
        ledger.next_demand(producer)
    again = attach(ledger, "consumer", "c4")
    assert ledger.next_demand(producer) is None
    ledger.end(again, "dead", "its Ray job is FAILED")
    with pytest.raises(PeerFailed, match="FAILED"):
        ledger.next_demand(producer)
    assert ledger.clients[archive].live


def test_a_job_that_both_sides_finished_holds_nothing_and_its_name_begins_anew(ledger, pair):
    producer, consumer = pair
    for rollout_id in range(2):
        publish(ledger, producer, rollout_id)
    ledger.put_value(consumer, "weights", payload("w0"))
    ledger.claim(consumer)
    ledger.ack(consumer, 0)
    ledger.end(producer, "finished")
    assert not ledger.status("exp")["exp"]["complete"]
    ledger.end(consumer, "finished")
    assert sorted(token for _, token in ledger.take_drops()) == ["t0", "t1", "w0"]
    assert ledger.status("exp")["exp"]["complete"]
    assert ledger.catalog() == []
    attach(ledger, "producer", "p2")
    assert publish(ledger, "p2", 0).version == 1


def test_what_is_published_waits_for_a_consumer_that_comes_later(ledger):
    producer = attach(ledger, "producer")
    publish(ledger, producer, 0)
    ledger.end(producer, "finished")
    assert ledger.take_drops() == []
    consumer = attach(ledger, "consumer")
    assert ledger.claim(consumer).rollout_id == 0


def test_a_second_rollout_job_is_refused_while_the_first_lives(ledger, pair, clock):
    with pytest.raises(JobIdTaken, match=r"exp is taken.*pid 42.*Stop that job, or choose another"):
        attach(ledger, "producer", "p2")
    clock.now += 31
    ledger.heartbeat("consumer", "alive")
    ledger.tick()
    attach(ledger, "producer", "p2")
    assert ledger.jobs["exp"].producer.epoch == 2
    with pytest.raises(Fenced):
        ledger.heartbeat("producer", "I was only asleep")
    with pytest.raises(Fenced):
        publish(ledger, "producer", 0)


def test_a_producer_of_the_same_ray_job_takes_over(ledger):
    attach(ledger, "producer", "p1", ray_job="r1")
    attach(ledger, "producer", "p2", ray_job="r1")
    with pytest.raises(Fenced, match="replaced"):
        publish(ledger, "p1", 0)
    publish(ledger, "p2", 0)


def test_settings_of_the_job_must_agree_while_the_other_side_lives(ledger, clock):
    attach(ledger, "producer", max_ahead=1)
    attach(ledger, "consumer")  # states nothing: takes what holds
    with pytest.raises(Refused, match=r"the producer .* disagree: --cross-job-max-ahead is 0 here and 1 there"):
        attach(ledger, "consumer", "c2", max_ahead=0)
    ledger.end("producer", "finished")
    attach(ledger, "consumer", "c3", max_ahead=0)
    assert ledger.jobs["exp"].max_ahead == 0


def test_stores_that_differ_are_compared_with_their_passwords_and_shown_without(ledger):
    attach(ledger, "producer", store="redis://:hunter2@host:6379/0")
    with pytest.raises(Refused, match=r"redis://:\*\*\*@host:6379/0 in both, with different credentials"):
        attach(ledger, "consumer", store="redis://:hunter3@host:6379/0")
    with pytest.raises(Refused, match=r"is file:///run1 here and redis://:\*\*\*@host:6379/0 there"):
        attach(ledger, "consumer", store="file:///run1")
    attach(ledger, "consumer", store="redis://:hunter2@host:6379/0")


def test_the_newest_value_wins_and_older_ones_are_freed(ledger, pair):
    _, consumer = pair
    assert ledger.get_value("exp", "weights") is None
    assert ledger.put_value(consumer, "weights", payload("w0"), 5).version == 5
    assert ledger.put_value(consumer, "weights", payload("w0"), 5).version == 5  # the same token: a retry
    assert ledger.put_value(consumer, "weights", payload("w1")).version == 6
    assert ledger.take_drops() == [("vault", "w0")]
    with pytest.raises(Refused, match="not newer than 6"):
        ledger.put_value(consumer, "weights", payload("w2"), 6)
    assert ledger.get_value("exp", "weights", newer_than=6) is None
    assert ledger.get_value("exp", "weights", newer_than=5).payload.token == "w1"


def test_forget_frees_all_but_not_under_a_live_client(ledger, pair):
    producer, consumer = pair
    publish(ledger, producer, 0)
    with pytest.raises(Refused, match="alive"):
        ledger.forget("exp")
    ledger.end(producer, "failed", "x")
    ledger.end(consumer, "failed", "x")
    ledger.forget("exp")
    assert ledger.take_drops() == [("vault", "t0")]
    assert ledger.status() == {}
    with pytest.raises(BrokerLost):
        ledger.heartbeat(producer, "")


def test_verdicts_say_who_when_and_what(ledger, clock):
    consumer = attach(ledger, "consumer")
    assert ledger.peer_verdict(consumer, 0)["kind"] == "absent"
    producer = attach(ledger, "producer")
    ledger.heartbeat(producer, "publishing rollout 3")
    found = ledger.peer_verdict(consumer, 0)
    assert (found["kind"], found["activity"]) == ("alive", "publishing rollout 3")
    clock.now += 7
    assert ledger.peer_verdict(consumer, 0)["kind"] == "slow"
    assert "7.0 s ago" in ledger.peer_verdict(consumer, 0)["message"]
    other = attach(ledger, "consumer", "c2")
    publish(ledger, producer, 0)
    ledger.claim(other, 0)
    assert ledger.peer_verdict(consumer, 0)["message"].startswith("it is leased: the consumer")
    assert ledger.peer_verdict(producer)["who"].startswith("consumer")


@pytest.mark.parametrize("bad", [-1, 1.5, "0", None, True])
def test_bad_rollout_ids_are_named(ledger, pair, bad):
    producer, consumer = pair
    with pytest.raises(BadInput, match="rollout id"):
        ledger.demand(consumer, bad)
    with pytest.raises(BadInput, match="rollout id"):
        publish(ledger, producer, bad, "t")


def test_roles_are_kept_apart(ledger, pair):
    producer, consumer = pair
    with pytest.raises(BadInput, match="only a producer"):
        publish(ledger, consumer, 0)
    with pytest.raises(BadInput, match="only a consumer"):
        ledger.claim(producer, 0)
    with pytest.raises(RolloutNotFound, match="jobs of this namespace: exp"):
        ledger.get("other", 0)
