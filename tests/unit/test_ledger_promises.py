"""Promises of the ledger that test_ledger_model.py found broken, each in the fewest steps."""

from collections.abc import Callable
from typing import Any

import pytest

from slime.cross_job.errors import BadInput, EndOfStream, JobIdTaken, PayloadLost, Refused
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import ClientInfo, Located, LocatedValue, Payload

from .ledger_hands import restarted


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(lambda: 1000.0, wall=lambda: 1000.0)


@pytest.fixture
def attach(ledger: Ledger) -> Callable[..., dict[str, Any]]:
    def attach(role: str, name: str, group: str = "train", ray_job: str = "", **stated: Any) -> dict[str, Any]:
        group = group if role == "consumer" else ""
        return ledger.attach(ClientInfo(name, "exp", role, group=group, ray_job_id=ray_job or name), **stated)

    return attach


def publish(ledger: Ledger, rollout_id: int, token: str = "", **facts: Any) -> Located:
    payload = Payload(token or f"t{rollout_id}", "vault", **{"nbytes": 1, **facts})
    return ledger.publish("p", rollout_id, payload)[1]


def put(ledger: Ledger, key: str, version: int, vault: str = "vault") -> LocatedValue:
    return ledger.put_value("c", key, Payload(f"{key}{version}", vault, 1), version)


def train(ledger: Ledger, consumer: str, rollout_id: int) -> None:
    ledger.claim(consumer, rollout_id)
    ledger.ack(consumer, rollout_id)


def test_a_retained_rollout_is_not_freed_under_the_lease_of_a_group_that_came_late(ledger, attach):
    attach("producer", "p", retain=1)
    attach("consumer", "c")
    attach("consumer", "late1", group="archive")
    ledger.end("late1", "finished")  # closed: holds nothing back
    for rollout_id in (0, 1):
        publish(ledger, rollout_id)
        if rollout_id == 0:
            train(ledger, "c", 0)  # acked by every open group: retained
    attach("consumer", "late2", group="archive")  # open again, and it has not acked rollout 0
    assert ledger.claim("late2").rollout_id == 0
    train(ledger, "c", 1)
    train(ledger, "late2", 1)  # the second that is acked by every open group, but rollout 0 no longer is
    assert ledger.take_drops() == []
    ledger.ack("late2", 0)
    assert ledger.status("exp")["exp"]["leased"] == 0


def test_a_group_is_through_when_its_last_member_says_so_not_its_newest(ledger, attach):
    attach("producer", "p")
    attach("consumer", "older")
    attach("consumer", "newer")
    publish(ledger, 0)
    ledger.claim("older", 0)
    ledger.end("p", "finished")
    ledger.end("newer", "finished")
    ledger.end("older", "dead", "killed")  # with rollout 0 in its hands: its restart must find it
    assert ledger.take_drops() == []
    attach("consumer", "restarted")
    assert ledger.claim("restarted").rollout_id == 0


def test_a_member_that_finishes_the_work_of_a_newer_one_that_died_ends_the_stream(ledger, attach):
    attach("producer", "p")
    attach("consumer", "older")
    attach("consumer", "newer")
    ledger.demand("newer", 0)
    publish(ledger, 0)
    ledger.end("newer", "dead", "killed")
    train(ledger, "older", 0)
    ledger.end("older", "finished")
    with pytest.raises(EndOfStream):
        ledger.next_demand("p")


def test_a_producer_hears_of_a_live_consumer_though_a_newer_one_died(ledger, attach):
    attach("producer", "p")
    attach("consumer", "older")
    attach("consumer", "newer")
    ledger.end("newer", "dead", "killed")
    assert ledger.peer_verdict("p")["kind"] == "alive"


def test_a_value_that_is_put_after_the_job_was_complete_is_freed_when_its_name_begins_anew(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    attach("writer", "w")
    ledger.end("p", "finished")
    ledger.end("c", "finished")
    ledger.put_value("w", "tokenizer", Payload("v0", "vault", 1))
    attach("producer", "next")
    readable = ledger.get_value("exp", "tokenizer") is not None
    assert readable or ledger.take_drops() == [("vault", "v0")]


def test_a_client_that_is_refused_changes_no_setting_of_the_job(ledger, attach):
    attach("producer", "p")
    with pytest.raises(JobIdTaken):
        attach("producer", "other", max_ahead=5)
    assert ledger.status("exp")["exp"]["max_ahead"] == 0


def test_a_client_that_is_refused_makes_no_job(ledger, attach):
    with pytest.raises(BadInput, match="role"):
        attach("trainer", "t")
    assert ledger.status() == {}


def test_what_a_live_client_stated_holds_though_another_repeated_it_and_left(ledger, attach):
    attach("producer", "p", max_ahead=1)
    attach("consumer", "c", max_ahead=1)
    ledger.end("c", "dead", "killed")
    with pytest.raises(Refused, match=r"the producer .* --cross-job-max-ahead is 0 here and 1 there"):
        attach("consumer", "restarted", max_ahead=0)


@pytest.mark.parametrize("role", ["consumer", "producer", "writer"])
def test_attaching_again_because_the_answer_was_lost_is_once(ledger, attach, role):
    first = attach(role, "same")
    again = attach(role, "same")
    assert again == first
    if role == "consumer":
        attach("producer", "p")
        ledger.end("same", "finished")
        with pytest.raises(EndOfStream):
            ledger.next_demand("p")


# ---------------------------------------------------------------------- what is lost, or too stale


def test_what_was_demanded_and_lost_before_anybody_claimed_it_is_wanted_again(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    ledger.demand("c", 0)
    publish(ledger, 0)
    ledger.payload_lost("exp", "t0")
    assert ledger.claim("c", 0) is None
    assert ledger.next_demand("p") == 0


def test_a_lease_on_a_version_that_was_lost_goes_over_to_the_next_one(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    publish(ledger, 0)
    ledger.claim("c", 0)
    ledger.payload_lost("exp", "t0")
    publish(ledger, 0, "again")
    assert ledger.claim("c", 0).payload.token == "again"


def test_what_was_lost_and_demanded_and_acked_after_all_is_not_generated(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    publish(ledger, 0)
    ledger.claim("c", 0)
    ledger.payload_lost("exp", "t0")  # the consumer has read it
    ledger.demand("c", 0)
    ledger.ack("c", 0)
    assert ledger.next_demand("p") is None


@pytest.mark.parametrize("way", ["lost", "stale", "restart"])
def test_a_version_number_never_means_two_contents(ledger, attach, way):
    attach("producer", "p", max_staleness=0, on_stale="regenerate")
    attach("consumer", "c")
    numbers = [publish(ledger, 0, token, weight_version=0).version for token in ("a", "b")]
    if way == "lost":
        ledger.payload_lost("exp", "b")
    elif way == "stale":
        put(ledger, "weights", 1)
        assert ledger.claim("c", 0) is None
    else:
        ledger = restarted(ledger)
    numbers += [publish(ledger, 0, "c", weight_version=1).version]
    assert numbers == [1, 2, 3]


def test_nobody_keeps_a_lease_on_what_was_dropped_as_too_stale(ledger, attach):
    attach("producer", "p", max_staleness=0, on_stale="drop")
    attach("consumer", "c")
    attach("consumer", "late")
    attach("consumer", "a", group="archive")
    publish(ledger, 0, weight_version=0)
    ledger.claim("c", 0)
    put(ledger, "weights", 1)
    assert ledger.claim("a") is None  # given up: nobody gets it any more
    ledger.ack("c", 0)
    assert ledger.status("exp")["exp"]["leased"] == 0
    ledger.end("p", "finished")
    with pytest.raises(EndOfStream):
        ledger.claim("late")


def test_what_was_not_taken_is_not_taken_when_the_vault_asks_again(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    put(ledger, "weights", 5)
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0
    ledger.resume("c", 0)  # the train job went back to a checkpoint, and the producer has fetched its weights
    assert [publish(ledger, 0, "t", weight_version=3).version for _ in range(2)] == [0, 0]
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0


def test_weights_that_are_lost_are_those_that_a_rollout_was_begun_for(ledger, attach):
    """The vault of the weights dies, then the rollout job, which is started again before the train job is."""
    attach("producer", "p")
    attach("consumer", "c")
    put(ledger, "weights", 5, vault="v2/a")
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0
    ledger.vault_lost("v2")
    ledger.end("p", "dead")
    attach("producer", "p2")
    assert ledger.next_demand("p2") == 0
    ledger.resume("c", 0)
    put(ledger, "weights", 4)
    made = Payload("t0", "vault", 1, weight_version=4)
    assert ledger.publish("p2", 0, made)[1].version == 0


def test_a_producer_may_use_older_weights_than_the_newest(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    ledger.resume("c", 0)
    put(ledger, "weights", 5)
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0
    assert publish(ledger, 0, weight_version=3).version == 1


def test_what_was_lost_is_no_end_of_the_stream(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    publish(ledger, 0)
    ledger.payload_lost("exp", "t0")
    ledger.end("p", "finished")
    for rollout_id in (0, None):
        with pytest.raises(PayloadLost, match=r"rollouts \[0\] of job exp .* start both jobs again"):
            ledger.claim("c", rollout_id)
    with pytest.raises(EndOfStream):
        ledger.claim("c", 1)


def test_a_rollout_that_was_skipped_keeps_nobody_from_going_back(ledger, attach):
    attach("producer", "p", max_staleness=0, on_stale="drop", retain=5)
    attach("consumer", "c")
    for rollout_id in range(3):
        publish(ledger, rollout_id, weight_version=rollout_id)
    train(ledger, "c", 0)
    put(ledger, "weights", 2)
    assert ledger.claim("c").rollout_id == 2
    assert ledger.resume("c", 0)["again"] == [0]


@pytest.mark.parametrize("way", ["acked", "given up", "not taken"])
def test_what_a_vault_publishes_again_and_nobody_can_have_is_freed_again(ledger, attach, way):
    attach("producer", "p", max_staleness=0, on_stale="regenerate")
    attach("consumer", "c")
    put(ledger, "weights", 1)
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0
    if way == "not taken":
        ledger.resume("c", 0)
    publish(ledger, 0, weight_version=0 if way == "not taken" else 1)
    if way == "acked":
        train(ledger, "c", 0)
    elif way == "given up":
        put(ledger, "weights", 2)
        assert ledger.claim("c", 0) is None
    for _ in range(2):
        assert ("vault", "t0") in ledger.take_drops()
        publish(ledger, 0, weight_version=0 if way == "not taken" else 1)
        assert ledger.catalog() == []


def test_where_a_source_stood_is_forgotten_once_nothing_begins_there(ledger, attach):
    attach("producer", "p")
    attach("consumer", "c")
    publish(ledger, 0, source={"at": 1})
    for token in ("t1", "t0 again"):
        rollout_id = int(token[1])
        publish(ledger, rollout_id, token, source={"at": 2})
        train(ledger, "c", rollout_id)
    job = ledger.jobs["exp"]
    assert (job.positions, [*job.sources]) == ({}, [job.frontier])


# ---------------------------------------------------------------------- room


def test_the_producer_does_not_wait_for_room_that_retention_can_give(ledger, attach):
    attach("producer", "p", retain=9, max_bytes=3)
    attach("consumer", "c")
    for rollout_id in (0, 1):
        publish(ledger, rollout_id)
        train(ledger, "c", rollout_id)
    publish(ledger, 2)
    ledger.claim("c", 2)
    ledger.demand("c", 3)
    assert ledger.next_demand("p") == 3
    publish(ledger, 3)
    assert ledger.take_drops() == [("vault", "t0")]


def test_nothing_is_retained_beyond_the_bound_on_bytes(ledger, attach):
    attach("producer", "p", retain=9, max_bytes=2)
    attach("consumer", "c")
    for rollout_id in (0, 1):
        publish(ledger, rollout_id)
        train(ledger, "c", rollout_id)
    publish(ledger, 2)
    assert ledger.take_drops() == [("vault", "t0")]
    assert ledger.status("exp")["exp"]["held_bytes"] == 2


def test_of_what_is_acked_at_once_the_highest_ids_are_retained(ledger, attach):
    attach("producer", "p", retain=1)
    attach("consumer", "c")
    attach("consumer", "a", group="archive")
    for rollout_id in (1, 0):
        publish(ledger, rollout_id)
        train(ledger, "c", rollout_id)
    ledger.end("a", "finished")  # it holds nothing back any more
    assert [located.rollout_id for located in ledger.catalog()] == [1]
