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
from slime.cross_job.ledger.state import ANSWERS
from slime.cross_job.types import ClientInfo, Payload
from tests.support.ledger import attach, publish, train


def payload(token, nbytes=10, **facts):
    return Payload(token, "v1/a", nbytes, **facts)


def test_a_rollout_goes_from_demand_to_ack_and_is_freed(pair):
    assert pair.next_demand("p") is None
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0
    assert pair.claim("c", 0) is None
    publish(pair, 0)
    located = pair.claim("c", 0)
    assert (located.rollout_id, located.version, located.payload.token) == (0, 1, "t0")
    assert pair.garbage.take_drops() == []
    pair.ack("c", 0)
    assert pair.garbage.take_drops() == [("v1/a", "t0")]
    assert pair.garbage.take_drops() == []
    with pytest.raises(RolloutNotFound, match="acked"):
        pair.claim("c", 0)
    with pytest.raises(RolloutNotFound, match="freed"):
        pair.demand("c", 0)
    with pytest.raises(Refused, match="freed"):
        publish(pair, 0, "again")


def test_claiming_again_is_the_same_lease_and_acking_twice_is_once(pair):
    publish(pair, 0)
    assert pair.claim("c", 0) == pair.claim("c", 0)
    pair.ack("c", 0)
    pair.ack("c", 0)
    status = pair.status("exp")["exp"]
    assert (status["claimed"], status["acked"], status["freed"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("max_ahead", "allowed"), [(0, []), (1, [4]), (3, [4, 5, 6])], ids=["train.py", "train_async.py", "three"]
)
def test_the_producer_goes_ahead_as_far_as_allowed(ledger, max_ahead, allowed):
    attach(ledger, "p", max_ahead=max_ahead)
    attach(ledger, "c")
    ledger.demand("c", 3)  # a trainer that resumes: nothing before 3 is generated
    publish(ledger, ledger.next_demand("p"))
    for rollout_id in allowed:
        assert ledger.next_demand("p") == rollout_id
        publish(ledger, rollout_id)
    assert ledger.next_demand("p") is None


def test_going_ahead_before_any_demand_needs_a_start_and_stops_at_until(ledger):
    attach(ledger, "p", max_ahead=2)
    assert ledger.next_demand("p") is None
    assert ledger.next_demand("p", start=7) == 7
    publish(ledger, 7)
    with pytest.raises(EndOfStream):
        ledger.next_demand("p", start=7, until=8)


def test_what_was_demanded_comes_before_going_ahead(ledger):
    attach(ledger, "p", max_ahead=5)
    attach(ledger, "c")
    for rollout_id in (4, 2):
        ledger.demand("c", rollout_id)
    assert ledger.next_demand("p") == 2


def test_the_same_token_is_the_same_version_and_other_content_the_next(pair):
    assert publish(pair, 0, "a").version == 1
    assert publish(pair, 0, "a").version == 1
    assert publish(pair, 0, "b").version == 2
    assert pair.claim("c", 0).version == 2
    assert pair.get("exp", 0, 1).payload.token == "a"
    assert [v.version for v in pair.versions("exp", 0)] == [1, 2]
    with pytest.raises(RolloutNotFound, match=r"versions? 1, 2, not 3"):
        pair.get("exp", 0, 3)
    assert pair.status("exp")["exp"]["republished"] == 1
    pair.ack("c", 0)
    assert sorted(pair.garbage.take_drops()) == [("v1/a", "a"), ("v1/a", "b")]


def test_a_retry_whose_answer_was_lost_is_once(pair):
    for rollout_id in range(3):
        publish(pair, rollout_id)
    first = pair.claim("c", token="a")
    assert pair.claim("c", token="a") == first
    assert pair.claim("c", token="b").rollout_id == 1
    train(pair, 2)
    assert pair.publish("p", 2, payload("t2"))[1].version == 1  # accepted before, acked and freed since
    pair.put_value("c", "k", payload("v0"))
    attach(pair, "w")
    pair.put_value("w", "k", payload("v1"))
    assert pair.put_value("c", "k", payload("v0")).version == 0
    assert pair.get_value("exp", "k").payload.token == "v1"


def test_each_thread_of_a_client_may_ask_again(pair):
    """Answers are lost in any order: one a client was remembered, and a retry got a third rollout."""
    for rollout_id in range(5):
        publish(pair, rollout_id)
    first, second = pair.claim("c", token="A"), pair.claim("c", token="B")
    assert [pair.claim("c", token=token) for token in "ABA"] == [first, second, first]
    assert sorted(pair.jobs["exp"].groups["train"].leases) == [0, 1]
    pair.release("c", 0, "C")
    pair.release("c", 1, "D")
    assert pair.claim("c", token="E").rollout_id == 0
    pair.release("c", 0, "C")  # was done: what another thread claimed since stays with it
    assert [*pair.jobs["exp"].groups["train"].leases] == [0]
    assert pair.claim("c", token="A").rollout_id == 1, "its lease was over"
    pair.rollouts.vault_lost("v1")
    for rollout_id in (3, 4, 3):
        assert pair.publish("p", rollout_id, payload(f"t{rollout_id}"))[1].version == 1
    assert pair.status("exp")["exp"]["published"] == 5
    for number, key in enumerate("kl"):
        pair.put_value("c", key, payload(f"v{number}"))
    pair.rollouts.vault_lost("v1")
    for number, key in enumerate("kl"):
        assert pair.put_value("c", key, payload(f"v{number}")).version == 0


def test_a_token_never_hands_out_what_another_claim_took_since(pair):
    publish(pair, 0)
    publish(pair, 1)
    pair.claim("c", token="A")
    pair.requeue("exp", 0)
    assert pair.claim("c", token="B").rollout_id == 0
    assert pair.claim("c", token="A").rollout_id == 1
    pair.requeue("exp", 0)
    assert pair.claim("c", 0, token="C").rollout_id == 0
    assert pair.claim("c", token="B") is None


def test_answers_that_are_remembered_stay_small(pair):
    """Ten megabytes of meta stayed in every snapshot until the next publish."""
    for rollout_id in range(3 * ANSWERS):
        publish(pair, rollout_id, meta={"text": "x" * 200_000})
        pair.put_value("c", "k", payload(f"v{rollout_id}"))
        pair.claim("c", token=f"c{rollout_id}")
        pair.release("c", rollout_id, f"r{rollout_id}")
        pair.claim("c", rollout_id, token=f"c{rollout_id}")
        pair.ack("c", rollout_id)
    for client in pair.clients.values():
        assert all(len(answers) <= ANSWERS for answers in client.answered.values())
        assert len(pickle.dumps(client)) < 6000
    assert len(pair.clients["c"].claims) <= 1


def test_claims_that_are_over_are_not_remembered(pair):
    for rollout_id in range(1000):
        publish(pair, rollout_id)
        pair.claim("c", rollout_id, token=f"c{rollout_id}")
        pair.ack("c", rollout_id)
    assert pair.clients["c"].claims == {}
    for rollout_id in range(1000, 1003):
        publish(pair, rollout_id)
        pair.claim("c", rollout_id, token=f"c{rollout_id}")
    pair.release("c", 1000)
    pair.requeue("exp", 1001)
    assert [*pair.clients["c"].claims] == [1002]
    pair.end("c", "stopped")
    assert pair.clients["c"].claims == {}


def test_an_answer_that_an_older_version_remembered_is_no_trouble(ledger):
    attach(ledger, "p")
    ledger.clients["p"].answered["publish"] = ("t0", None)
    assert publish(ledger, 0).version == 1
    assert publish(ledger, 0).version == 1


def test_what_may_be_equal_is_not_recorded_before_it_was_compared(pair):
    pair.publish("p", 0, payload("a"), compare=True)
    recorded, newest = pair.publish("p", 0, payload("b"), compare=True)
    assert (recorded, newest.version) == (False, 1)
    assert pair.publish("p", 0, payload("c", nbytes=11), compare=True)[0]
    assert pair.publish("p", 0, payload("d", nbytes=11, weight_version=3), compare=True)[0]


def test_a_lease_stays_with_its_version(pair):
    publish(pair, 0, "a")
    assert pair.claim("c", 0).version == 1
    publish(pair, 0, "b")
    assert pair.claim("c", 0).version == 1
    assert pair.get("exp", 0).version == 2


def test_within_a_group_a_rollout_has_one_owner_and_every_group_gets_all(ledger):
    attach(ledger, "p")
    first, second = attach(ledger, "c1"), attach(ledger, "c2")
    archive = attach(ledger, "c3", group="archive")
    for rollout_id in range(2):
        publish(ledger, rollout_id)
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
    assert ledger.garbage.take_drops() == []  # the archive has not acked it
    ledger.ack(archive, 0)
    assert ledger.garbage.take_drops() == [("v1/a", "t0")]


def test_released_and_orphaned_rollouts_are_claimable_again(ledger, clock):
    attach(ledger, "p")
    first, second = attach(ledger, "c1"), attach(ledger, "c2")
    publish(ledger, 0)
    ledger.claim(first)
    ledger.release(first, 0)
    assert ledger.claim(second, 0).rollout_id == 0
    clock.now += 31
    ledger.heartbeat(first, "alive")
    ledger.heartbeat("p", "alive")
    assert [c.info.client_id for c in ledger.membership.tick()] == [second]
    assert ledger.claim(first).rollout_id == 0
    with pytest.raises(Fenced, match=r"took what it held after 31\.0 s without a sign of life"):
        ledger.ack(second, 0)
    assert ledger.status("exp")["exp"]["requeued"] == 2


def test_a_broker_that_stood_still_counts_nobody_dead_for_what_it_did_not_hear(pair, clock):
    pair.membership.tick()
    clock.now += 1000
    gone = pair.membership.tick(stopped_s=999.0)
    assert gone == []
    for _ in range(31):
        clock.now += 1
        gone += pair.membership.tick()
    assert {client.info.client_id for client in gone} == {"p", "c"}


def test_a_late_tick_by_itself_forgives_nothing(pair, clock):
    for round_s in (0.5, 5.5, 10.5, 30.5):
        clock.now += round_s
        pair.membership.tick()
    assert {client.state for client in pair.clients.values()} == {"silent"}


def test_retention_keeps_the_newest_acked(ledger):
    attach(ledger, "p", retain=2)
    attach(ledger, "c")
    for rollout_id in range(4):
        publish(ledger, rollout_id)
        ledger.claim("c", rollout_id)
        ledger.ack("c", rollout_id)
    assert ledger.garbage.take_drops() == [("v1/a", "t0"), ("v1/a", "t1")]
    assert [located.rollout_id for located in ledger.catalog("exp")] == [2, 3]
    assert ledger.listed("exp") == ledger.listed() == {"exp": [2, 3]}
    with pytest.raises(RolloutNotFound):
        ledger.listed("other")


def test_a_finished_producer_is_end_of_stream_and_a_failed_one_is_not(pair, clock):
    publish(pair, 0)
    pair.end("p", "finished")
    assert pair.claim("c").rollout_id == 0  # what was published is still there
    with pytest.raises(EndOfStream):
        pair.claim("c", 1)
    with pytest.raises(Fenced):
        publish(pair, 1)
    other = attach(pair, "p2")
    pair.end(other, "failed", "ValueError: boom")
    with pytest.raises(PeerFailed, match="ValueError: boom") as raised:
        pair.claim("c", 1)
    assert raised.value.verdict["kind"] == "failed"
    clock.now += 4
    assert pair.claim("c", 1, grace_s=5) is None
    clock.now += 2
    with pytest.raises(PeerFailed):
        pair.claim("c", 1, grace_s=5)


def test_no_end_of_stream_while_another_holds_a_lease_that_may_come_back(ledger):
    attach(ledger, "p")
    first, second = attach(ledger, "c1"), attach(ledger, "c2")
    publish(ledger, 0)
    ledger.claim(first)
    ledger.end("p", "finished")
    assert ledger.claim(second) is None
    ledger.end(first, "dead", "killed")
    assert ledger.claim(second).rollout_id == 0
    ledger.ack(second, 0)
    with pytest.raises(EndOfStream):
        ledger.claim(second)


def test_the_producer_learns_how_its_consumers_ended(pair):
    pair.demand("c", 0)
    archive = attach(pair, "c3", group="archive")  # has demanded nothing: it does not keep the job going
    pair.next_demand("p")
    publish(pair, 0)
    pair.end("c", "finished")
    with pytest.raises(EndOfStream):
        pair.next_demand("p")
    again = attach(pair, "c4")
    assert pair.next_demand("p") is None
    pair.end(again, "dead", "its Ray job is FAILED")
    with pytest.raises(PeerFailed, match="FAILED"):
        pair.next_demand("p")
    assert pair.clients[archive].live


def test_a_job_that_both_sides_finished_holds_nothing_and_its_name_begins_anew(pair):
    for rollout_id in range(2):
        publish(pair, rollout_id)
    pair.put_value("c", "weights", payload("w0"))
    pair.claim("c")
    pair.ack("c", 0)
    pair.end("p", "finished")
    assert not pair.status("exp")["exp"]["complete"]
    pair.end("c", "finished")
    assert sorted(token for _, token in pair.garbage.take_drops()) == ["t0", "t1", "w0"]
    assert pair.status("exp")["exp"]["complete"]
    assert pair.catalog() == []
    for rollout_id, words in ((0, "was acked and freed"), (1, "was freed without an ack, when its consumers had fin")):
        with pytest.raises(RolloutNotFound, match=words):
            pair.versions("exp", rollout_id)
    attach(pair, "p2")
    assert publish(pair, 0, producer="p2").version == 1


def test_what_is_published_waits_for_a_consumer_that_comes_later(ledger):
    attach(ledger, "p")
    publish(ledger, 0)
    ledger.end("p", "finished")
    assert ledger.garbage.take_drops() == []
    attach(ledger, "c")
    assert ledger.claim("c").rollout_id == 0


def test_a_second_rollout_job_is_refused_while_the_first_lives(ledger, clock):
    ledger.membership.attach(ClientInfo("p", "exp", "producer", ray_job_id="r-p", pid=42, host="h"))
    attach(ledger, "c")
    with pytest.raises(JobIdTaken, match=r"exp is taken.*pid 42.*Stop that job, or choose another"):
        attach(ledger, "p2")
    clock.now += 31
    ledger.heartbeat("c", "alive")
    ledger.membership.tick()
    attach(ledger, "p2")
    assert ledger.jobs["exp"].producer.epoch == 2
    with pytest.raises(Fenced):
        ledger.heartbeat("p", "I was only asleep")
    with pytest.raises(Fenced):
        publish(ledger, 0)


def test_a_producer_of_the_same_ray_job_takes_over(ledger):
    attach(ledger, "p1", ray_job="r1")
    attach(ledger, "p2", ray_job="r1")
    with pytest.raises(Fenced, match="replaced"):
        publish(ledger, 0, producer="p1")
    publish(ledger, 0, producer="p2")


def test_settings_of_the_job_must_agree_while_the_other_side_lives(ledger):
    attach(ledger, "p", max_ahead=1)
    attach(ledger, "c")  # states nothing: takes what holds
    with pytest.raises(Refused, match=r"the producer .* disagree: --cross-job-max-ahead is 0 here and 1 there"):
        attach(ledger, "c2", max_ahead=0)
    ledger.end("p", "finished")
    attach(ledger, "c3", max_ahead=0)
    assert ledger.jobs["exp"].max_ahead == 0


def test_stores_that_differ_are_compared_with_their_passwords_and_shown_without(ledger):
    attach(ledger, "p", store="redis://:hunter2@host:6379/0")
    with pytest.raises(Refused, match=r"redis://:\*\*\*@host:6379/0 in both, with different credentials"):
        attach(ledger, "c", store="redis://:hunter3@host:6379/0")
    with pytest.raises(Refused, match=r"is file:///run1 here and redis://:\*\*\*@host:6379/0 there"):
        attach(ledger, "c", store="file:///run1")
    attach(ledger, "c", store="redis://:hunter2@host:6379/0")


def test_the_newest_value_wins_and_older_ones_are_freed(pair):
    assert pair.get_value("exp", "weights") is None
    assert pair.put_value("c", "weights", payload("w0"), 5).version == 5
    assert pair.put_value("c", "weights", payload("w0"), 5).version == 5  # the same token: a retry
    assert pair.put_value("c", "weights", payload("w1")).version == 6
    assert pair.garbage.take_drops() == [("v1/a", "w0")]
    with pytest.raises(Refused, match="not newer than 6"):
        pair.put_value("c", "weights", payload("w2"), 6)
    assert pair.get_value("exp", "weights", newer_than=6) is None
    assert pair.get_value("exp", "weights", newer_than=5).payload.token == "w1"


def test_forget_frees_all_but_not_under_a_live_client(pair):
    publish(pair, 0)
    with pytest.raises(Refused, match="alive"):
        pair.forget("exp")
    pair.end("p", "failed", "x")
    pair.end("c", "failed", "x")
    pair.forget("exp")
    assert pair.garbage.take_drops() == [("v1/a", "t0")]
    assert pair.status() == {}
    with pytest.raises(BrokerLost):
        pair.heartbeat("p", "")


def test_verdicts_say_who_when_and_what(ledger, clock):
    attach(ledger, "c")
    assert ledger.peer_verdict("c", 0)["kind"] == "absent"
    attach(ledger, "p")
    ledger.heartbeat("p", "publishing rollout 3")
    found = ledger.peer_verdict("c", 0)
    assert (found["kind"], found["activity"]) == ("alive", "publishing rollout 3")
    clock.now += 7
    assert ledger.peer_verdict("c", 0)["kind"] == "slow"
    assert "7.0 s ago" in ledger.peer_verdict("c", 0)["message"]
    other = attach(ledger, "c2")
    publish(ledger, 0)
    ledger.claim(other, 0)
    assert ledger.peer_verdict("c", 0)["message"].startswith("it is leased: the consumer")
    assert ledger.peer_verdict("p")["who"].startswith("consumer")


@pytest.mark.parametrize("bad", [-1, 1.5, "0", None, True])
def test_bad_rollout_ids_are_named(pair, bad):
    with pytest.raises(BadInput, match="rollout id"):
        pair.demand("c", bad)
    with pytest.raises(BadInput, match="rollout id"):
        publish(pair, bad, "t")


def test_roles_are_kept_apart(pair):
    with pytest.raises(BadInput, match="only a producer"):
        publish(pair, 0, producer="c")
    with pytest.raises(BadInput, match="only a consumer"):
        pair.claim("p", 0)
    with pytest.raises(RolloutNotFound, match="no job 'other'; it has exp"):
        pair.get("other", 0)
