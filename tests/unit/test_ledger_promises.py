"""Promises of the ledger that test_ledger_model.py found broken, each in the fewest steps."""

from collections.abc import Callable
from typing import Any

import pytest

from slime.cross_job.errors import BadInput, EndOfStream, JobIdTaken, Refused
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import ClientInfo, Payload


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(lambda: 1000.0, wall=lambda: 1000.0)


@pytest.fixture
def attach(ledger: Ledger) -> Callable[..., dict[str, Any]]:
    def attach(role: str, name: str, group: str = "train", ray_job: str = "", **stated: int) -> dict[str, Any]:
        group = group if role == "consumer" else ""
        return ledger.attach(ClientInfo(name, "exp", role, group=group, ray_job_id=ray_job or name), **stated)

    return attach


def publish(ledger: Ledger, rollout_id: int) -> None:
    ledger.publish("p", rollout_id, Payload(f"t{rollout_id}", "vault", 1))


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
    with pytest.raises(Refused, match="--cross-job-max-ahead is 0 here and 1 at the producer"):
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
