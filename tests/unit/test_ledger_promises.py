"""Promises of the ledger that test_ledger_model.py found broken, each in the fewest steps."""

import pytest

from slime.cross_job.errors import BadInput, EndOfStream, JobIdTaken, PayloadLost, PeerFailed, Refused
from slime.cross_job.types import ClientInfo, Payload
from tests.support.ledger import attach, figures, publish, restarted, train, weights


def test_a_retained_rollout_is_not_freed_under_the_lease_of_a_group_that_came_late(ledger):
    attach(ledger, "p", retain=1)
    attach(ledger, "c")
    attach(ledger, "c-late1", group="archive")
    ledger.end("c-late1", "finished")  # closed: holds nothing back
    for rollout_id in (0, 1):
        publish(ledger, rollout_id)
        if rollout_id == 0:
            train(ledger, 0)  # acked by every open group: retained
    attach(ledger, "c-late2", group="archive")  # open again, and it has not acked rollout 0
    assert ledger.claim("c-late2").rollout_id == 0
    train(ledger, 1)
    train(ledger, 1, consumer="c-late2")  # the second that is acked by every open group, but rollout 0 no longer is
    assert ledger.garbage.take_drops() == []
    ledger.ack("c-late2", 0)
    assert figures(ledger, "leased") == [0]


def test_a_group_is_through_when_its_last_member_says_so_not_its_newest(ledger):
    attach(ledger, "p")
    attach(ledger, "c-older")
    attach(ledger, "c-newer")
    publish(ledger, 0)
    ledger.claim("c-older", 0)
    ledger.end("p", "finished")
    ledger.end("c-newer", "finished")
    ledger.end("c-older", "dead", "killed")  # with rollout 0 in its hands: its restart must find it
    assert ledger.garbage.take_drops() == []
    attach(ledger, "c-restarted")
    assert ledger.claim("c-restarted").rollout_id == 0


def test_a_member_that_finishes_the_work_of_a_newer_one_that_died_ends_the_stream(ledger):
    attach(ledger, "p")
    attach(ledger, "c-older")
    attach(ledger, "c-newer")
    ledger.demand("c-newer", 0)
    publish(ledger, 0)
    ledger.end("c-newer", "dead", "killed")
    train(ledger, 0, consumer="c-older")
    ledger.end("c-older", "finished")
    with pytest.raises(EndOfStream):
        ledger.next_demand("p")


@pytest.mark.parametrize("order", [("train", "archive"), ("archive", "train")])
def test_a_producer_waits_as_long_as_the_last_group_that_died_is_missed(ledger, clock, order):
    attach(ledger, "p")
    for group in order:  # a broker that restarts may know them in another order
        attach(ledger, f"c-{group}", group=group)
    ledger.end("c-archive", "dead", "killed")
    clock.now += 8
    ledger.end("c-train", "dead", "killed")
    clock.now += 8
    assert ledger.next_demand("p", grace_s=10) is None
    clock.now += 2
    with pytest.raises(PeerFailed):
        ledger.next_demand("p", grace_s=10)


def test_a_producer_hears_of_a_live_consumer_though_a_newer_one_died(ledger):
    attach(ledger, "p")
    attach(ledger, "c-older")
    attach(ledger, "c-newer")
    ledger.end("c-newer", "dead", "killed")
    assert ledger.peer_verdict("p")["kind"] == "alive"


def test_a_value_that_is_put_after_the_job_was_complete_is_freed_when_its_name_begins_anew(pair):
    attach(pair, "w")
    pair.end("p", "finished")
    pair.end("c", "finished")
    pair.put_value("w", "tokenizer", Payload("v0", "v1/a", 1))
    attach(pair, "p-next")
    readable = pair.get_value("exp", "tokenizer") is not None
    assert readable or pair.garbage.take_drops() == [("v1/a", "v0")]


def test_a_client_that_is_refused_changes_no_setting_of_the_job(ledger):
    attach(ledger, "p")
    with pytest.raises(JobIdTaken):
        attach(ledger, "p-other", max_ahead=5)
    assert figures(ledger, "max_ahead") == [0]


def test_a_client_that_is_refused_makes_no_job(ledger):
    with pytest.raises(BadInput, match="role"):
        ledger.membership.attach(ClientInfo("t", "exp", "trainer", ray_job_id="r"))
    assert ledger.status() == {}


def test_what_a_live_client_stated_holds_though_another_repeated_it_and_left(ledger):
    attach(ledger, "p", max_ahead=1)
    attach(ledger, "c", max_ahead=1)
    ledger.end("c", "dead", "killed")
    with pytest.raises(Refused, match=r"the producer .* --cross-job-max-ahead is 0 here and 1 there"):
        attach(ledger, "c-restarted", max_ahead=0)


@pytest.mark.parametrize("role", ["consumer", "producer", "writer"])
def test_attaching_again_because_the_answer_was_lost_is_once(ledger, role):
    info = ClientInfo("same", "exp", role, group="train" if role == "consumer" else "", ray_job_id="r")
    assert ledger.membership.attach(info) == ledger.membership.attach(info)
    if role == "consumer":
        attach(ledger, "p")
        ledger.end("same", "finished")
        with pytest.raises(EndOfStream):
            ledger.next_demand("p")


# ---------------------------------------------------------------------- what is lost, or too stale


def test_what_was_demanded_and_lost_before_anybody_claimed_it_is_wanted_again(pair):
    pair.demand("c", 0)
    publish(pair, 0)
    pair.rollouts.payload_lost("exp", "t0")
    assert pair.claim("c", 0) is None
    assert pair.next_demand("p") == 0


def test_a_lease_on_a_version_that_was_lost_goes_over_to_the_next_one(pair):
    publish(pair, 0)
    pair.claim("c", 0)
    pair.rollouts.payload_lost("exp", "t0")
    publish(pair, 0, "again")
    assert pair.claim("c", 0).payload.token == "again"


@pytest.mark.parametrize("way", ["lost", "stale", "restart"])
def test_a_version_number_never_means_two_contents(ledger, way):
    attach(ledger, "p", max_staleness=0, on_stale="regenerate")
    attach(ledger, "c")
    numbers = [publish(ledger, 0, token, weight_version=0).version for token in ("a", "b")]
    if way == "lost":
        ledger.rollouts.payload_lost("exp", "b")
    elif way == "stale":
        weights(ledger, 1)
        assert ledger.claim("c", 0) is None
    else:
        ledger = restarted(ledger)
    numbers += [publish(ledger, 0, "c", weight_version=1).version]
    assert numbers == [1, 2, 3]


def test_nobody_keeps_a_lease_on_what_was_dropped_as_too_stale(ledger):
    attach(ledger, "p", max_staleness=0, on_stale="drop")
    attach(ledger, "c")
    attach(ledger, "c-late")
    attach(ledger, "ca", group="archive")
    publish(ledger, 0, weight_version=0)
    ledger.claim("c", 0)
    weights(ledger, 1)
    assert ledger.claim("ca") is None  # given up: nobody gets it any more
    ledger.ack("c", 0)
    assert figures(ledger, "leased") == [0]
    ledger.end("p", "finished")
    with pytest.raises(EndOfStream):
        ledger.claim("c-late")


def test_what_was_not_taken_is_not_taken_when_the_vault_asks_again(pair):
    weights(pair, 5)
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0
    pair.resume("c", 0)  # the train job went back to a checkpoint, and the producer has fetched its weights
    assert [publish(pair, 0, "t", weight_version=3).version for _ in range(2)] == [0, 0]
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0


def test_weights_that_are_lost_are_those_that_a_rollout_was_begun_for(pair):
    """The vault of the weights dies, then the rollout job, which is started again before the train job is."""
    pair.put_value("c", "weights", Payload("w5", "v2/a", 1), 5)
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0
    pair.rollouts.vault_lost("v2")
    pair.end("p", "dead")
    attach(pair, "p2")
    assert pair.next_demand("p2") == 0
    pair.resume("c", 0)
    weights(pair, 4)
    assert publish(pair, 0, producer="p2", weight_version=4).version == 0


def test_a_producer_may_use_older_weights_than_the_newest(pair):
    pair.resume("c", 0)
    weights(pair, 5)
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0
    assert publish(pair, 0, weight_version=3).version == 1


def test_what_was_lost_is_no_end_of_the_stream(pair):
    publish(pair, 0)
    pair.rollouts.payload_lost("exp", "t0")
    pair.end("p", "finished")
    for rollout_id in (0, None):
        with pytest.raises(PayloadLost, match=r"rollouts \[0\] of job exp .* start both jobs again"):
            pair.claim("c", rollout_id)
    with pytest.raises(EndOfStream):
        pair.claim("c", 1)


@pytest.mark.parametrize("which", [0, None])
def test_what_an_operator_dropped_is_no_end_of_the_stream(pair, which):
    publish(pair, 0)
    pair.demand("c", 1)
    pair.end("p", "finished")
    pair.discard("exp", 0)
    with pytest.raises(Refused, match=r"rollouts \[0\] of job exp were dropped .* start both jobs again"):
        pair.claim("c", which)
    with pytest.raises(EndOfStream):
        pair.claim("c", 1)
    attach(pair, "p2")
    assert pair.next_demand("p2") == 0


def test_a_rollout_that_was_skipped_keeps_nobody_from_going_back(ledger):
    attach(ledger, "p", max_staleness=0, on_stale="drop", retain=5)
    attach(ledger, "c")
    for rollout_id in range(3):
        publish(ledger, rollout_id, weight_version=rollout_id)
    train(ledger, 0)
    weights(ledger, 2)
    assert ledger.claim("c").rollout_id == 2
    assert ledger.resume("c", 0)["again"] == [0]


@pytest.mark.parametrize("way", ["acked", "given up", "not taken"])
def test_what_a_vault_publishes_again_and_nobody_can_have_is_freed_again(ledger, way):
    attach(ledger, "p", max_staleness=0, on_stale="regenerate")
    attach(ledger, "c")
    weights(ledger, 1)
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0
    if way == "not taken":
        ledger.resume("c", 0)
    publish(ledger, 0, weight_version=0 if way == "not taken" else 1)
    if way == "acked":
        train(ledger, 0)
    elif way == "given up":
        weights(ledger, 2)
        assert ledger.claim("c", 0) is None
    for _ in range(2):
        assert ("v1/a", "t0") in ledger.garbage.take_drops()
        publish(ledger, 0, weight_version=0 if way == "not taken" else 1)
        assert ledger.catalog() == []


def test_where_a_source_stood_is_forgotten_once_nothing_begins_there(pair):
    publish(pair, 0, source={"at": 1})
    for token in ("t1", "t0 again"):
        rollout_id = int(token[1])
        publish(pair, rollout_id, token, source={"at": 2})
        train(pair, rollout_id)
    job = pair.jobs["exp"]
    assert (job.positions, [*job.sources]) == ({}, [job.frontier])


# ---------------------------------------------------------------------- room


def test_the_producer_does_not_wait_for_room_that_retention_can_give(ledger):
    attach(ledger, "p", retain=9, max_bytes=30)
    attach(ledger, "c")
    for rollout_id in (0, 1):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    publish(ledger, 2)
    ledger.claim("c", 2)
    ledger.demand("c", 3)
    assert ledger.next_demand("p") == 3
    publish(ledger, 3)
    assert ledger.garbage.take_drops() == [("v1/a", "t0")]


def test_nothing_is_retained_beyond_the_bound_on_bytes(ledger):
    attach(ledger, "p", retain=9, max_bytes=20)
    attach(ledger, "c")
    for rollout_id in (0, 1):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    publish(ledger, 2)
    assert ledger.garbage.take_drops() == [("v1/a", "t0")]
    assert figures(ledger, "held_bytes") == [20]


def test_of_what_is_acked_at_once_the_highest_ids_are_retained(ledger):
    attach(ledger, "p", retain=1)
    attach(ledger, "c")
    attach(ledger, "ca", group="archive")
    for rollout_id in (1, 0):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    ledger.end("ca", "finished")  # it holds nothing back any more
    assert [located.rollout_id for located in ledger.catalog()] == [1]


def test_what_is_published_again_after_its_vault_died_is_retained_within_the_bounds(ledger):
    """The answer to a publish was lost, and so was its vault; the bytes count as those of any other version."""
    attach(ledger, "p", retain_bytes=10)
    attach(ledger, "c")
    publish(ledger, 0, "first")
    publish(ledger, 0, "second")
    ledger.rollouts.payload_lost("exp", "second")
    train(ledger, 0)
    assert [v.payload.token for v in ledger.versions("exp", 0)] == ["first"]
    publish(ledger, 0, "second")
    assert 0 in ledger.jobs["exp"].freed
    assert {token for _, token in ledger.garbage.take_drops()} >= {"first", "second"}
