"""Silence is not death: who is silent may lose its place and what it holds to whoever wants that, and nothing else."""

import pytest

from slime.cross_job.errors import Fenced, JobIdTaken, PeerFailed
from tests.support.ledger import attach, figures, publish, publish_each, train


def silent(ledger, clock, *names, vouched=True):
    """These fall silent for longer than their lease; the others do not."""
    clock.now += 31
    for name in [*ledger.clients]:
        if name not in names:
            ledger.heartbeat(name, "at work")
    for name in names if vouched else ():
        ledger.membership.vouch(ledger.clients[name])
    assert [client.info.client_id for client in ledger.membership.tick()] == [*names]


def test_who_wakes_up_and_was_not_replaced_goes_on_with_what_it_held(pair, clock):
    publish(pair, 0)
    pair.claim("c", 0)
    silent(pair, clock, "c")
    assert pair.peer_verdict("p")["kind"] == "silent"
    assert pair.next_demand("p") is None, "its peer waits on"
    assert pair.heartbeat("c", "awake")["epoch"] == 2
    pair.ack("c", 0)
    assert figures(pair, "acked", "requeued", "restarts") == [1, 0, {"producer": 0, "consumer train": 0}]


def test_a_producer_hears_of_the_consumer_that_lives_not_of_a_later_one_that_is_silent(pair, clock):
    clock.now += 1
    attach(pair, "c-later", group="eval")
    silent(pair, clock, "c-later", vouched=False)
    assert pair.peer_verdict("p")["kind"] == "alive"


def test_another_of_the_group_takes_what_a_silent_one_holds_and_that_one_is_fenced(pair, clock):
    attach(pair, "c2")
    publish_each(pair, *range(3))
    pair.claim("c", 0)
    pair.claim("c", 2)
    assert pair.claim("c2").rollout_id == 1
    silent(pair, clock, "c")
    assert [pair.claim("c2").rollout_id, pair.claim("c2").rollout_id] == [0, 2]
    with pytest.raises(Fenced, match=r"another consumer of its group .* took what it held"):
        pair.heartbeat("c", "awake")


def test_a_consumer_that_goes_first_fences_a_silent_one_of_another_job(pair, clock):
    attach(pair, "c2")
    with pytest.raises(JobIdTaken):
        pair.first("c2")
    silent(pair, clock, "c")
    assert pair.first("c2")
    with pytest.raises(Fenced, match="took its place"):
        pair.heartbeat("c", "awake")


def test_a_producer_that_wakes_up_has_the_engines_that_it_had(pair, clock):
    pair.announce("p", ["handles"])
    pair.demand("c", 0)
    pair.next_demand("p", gated=True)
    epoch = pair.begin_update("c")
    pair.end_update("c", 1, epoch)
    silent(pair, clock, "p")
    assert pair.loaded("c") == 1
    assert pair.heartbeat("p", "awake")["epoch"] == 2
    assert (pair.facts("c")[0], pair.unloaded("c"), pair.loaded("c")) == (epoch, None, 1), "nothing is loaded again"


def test_of_whom_ray_says_nothing_any_more_counts_as_dead_after_a_while(pair, clock):
    silent(pair, clock, "p")
    assert pair.claim("c", 0, grace_s=10) is None
    clock.now += 61
    pair.heartbeat("c", "waiting")
    assert pair.claim("c", 0, grace_s=60) is None, "the grace begins when it counts as dead"
    with pytest.raises(PeerFailed, match="counts as dead"):
        pair.claim("c", 0)
    assert pair.heartbeat("p", "awake")["epoch"] == 2
    assert pair.claim("c", 0) is None


def test_a_silent_one_that_counts_as_dead_is_in_nobodys_way(pair, clock):
    silent(pair, clock, "p", "c", vouched=False)
    attach(pair, "p2", max_ahead=3)
    assert pair.close_group("exp", "train") == []
    pair.end("p2", "finished")
    pair.forget("exp")


def test_a_resumption_whose_answer_was_lost_is_not_made_again(ledger):
    attach(ledger, "c", ray_job="r-c", retain=5)
    attach(ledger, "p")
    for rollout_id in range(2):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    assert ledger.resume("c", 1, token="t") == {"again": [1], "acked": []}
    attach(ledger, "c2", ray_job="r-c")
    ledger.claim("c2", 1)
    assert ledger.resume("c", 1, token="t") == {"again": [1], "acked": []}
    ledger.ack("c2", 1)
