"""How long what every group has acked can still be had, and where it lies meanwhile."""

import pytest

from slime.cross_job.errors import Refused, RolloutNotFound
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.snapshot import restore
from tests.support.ledger import (
    Clock,
    attach,
    attach_pair,
    figures,
    publish,
    publish_each,
    remembered,
    restarted,
    train,
    weights,
)


def ids(ledger: Ledger) -> list[int]:
    return [located.rollout_id for located in ledger.catalog()]


def test_what_is_acked_is_retained_for_a_time(ledger, clock):
    attach_pair(ledger, retain_s=10.0)
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
        clock.now += 4
    assert ledger.lifetime.expire() == ["exp"]
    assert ids(ledger) == [1, 2]
    assert ledger.lifetime.expire() == []
    clock.now += 20
    publish(ledger, 3)
    assert ids(ledger) == [3], "what is not acked stays, however old"
    clock.now += 1000
    assert ledger.lifetime.expire() == []
    assert ids(ledger) == [3]


@pytest.mark.parametrize("step", [3700.0, -3700.0])
def test_a_step_of_the_wall_clock_frees_nothing_and_keeps_nothing(clock, step):
    wall = Clock()
    ledger = Ledger(clock, wall)
    attach_pair(ledger, retain_s=3600.0)
    for rollout_id in range(50):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    wall.now += step
    assert ledger.lifetime.expire() == []
    assert len(ids(ledger)) == 50
    clock.now += 3601
    assert ledger.lifetime.expire() == ["exp"]
    assert ids(ledger) == []


def test_ages_outlive_the_broker_whose_clock_begins_anew(clock):
    ledger = Ledger(clock, Clock())
    attach_pair(ledger, retain_s=100.0)
    publish(ledger, 0)
    train(ledger, 0)
    clock.now += 60
    held = ledger.versions("exp", 0)
    clock.now += 10
    kept = remembered(ledger)
    later = Clock()
    later.now = 5.0  # since another machine was started, say
    again = Ledger(later, Clock())
    restore(again, kept, held)
    later.now += 29
    assert again.lifetime.expire() == []
    later.now += 2
    assert again.lifetime.expire() == ["exp"]


def test_times_of_an_earlier_version_begin_anew(clock):
    """They were wall-clock times: nothing may be freed because they are read as ages, and nothing kept for ever."""
    ledger = Ledger(clock, Clock())
    attach_pair(ledger, retain_s=100.0)
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    kept = remembered(ledger)
    kept[0][1]["done"].update({rollout_id: 1.7e9 + rollout_id for rollout_id in range(3)})
    again = Ledger(clock, Clock())
    restore(again, kept, [located for r in range(3) for located in ledger.versions("exp", r)])
    clock.now += 99
    assert again.lifetime.expire() == []
    assert [*again.jobs["exp"].done] == [0, 1, 2]
    clock.now += 2
    assert again.lifetime.expire() == ["exp"]
    assert ids(again) == []


def test_what_is_acked_is_retained_up_to_so_many_bytes(ledger):
    attach_pair(ledger, retain_bytes=25)
    publish_each(ledger, *range(4))
    train(ledger, 0, 1, 2)
    assert ids(ledger) == [1, 2, 3]
    train(ledger, 3)
    assert ids(ledger) == [2, 3]


def test_every_bound_on_retention_counts(ledger, clock):
    attach_pair(ledger, retain=2, retain_s=10.0, retain_bytes=1000)
    publish_each(ledger, *range(4))
    train(ledger, 0, 1, 2)
    assert ids(ledger) == [1, 2, 3]
    clock.now += 11
    assert ledger.lifetime.expire() == ["exp"]
    assert ids(ledger) == [3]


def test_what_everybody_has_had_and_the_store_holds_leaves_the_object_store(ledger):
    attach_pair(ledger, retain=5, max_bytes=15, store="memory://x")
    publish(ledger, 0, stored="n0")
    assert figures(ledger, "held_bytes") == [10]
    train(ledger, 0)
    assert ledger.garbage.take_drops() == [("v1/a", "t0")]
    assert figures(ledger, "held_bytes", "retained") == [0, 1]
    assert ledger.get("exp", 0).payload.vault == ""
    publish(ledger, 1, stored="n1")
    assert ledger.pacing.held_back(ledger.jobs["exp"]) is not None, "what is not acked fills it"
    train(ledger, 1)
    assert ledger.pacing.held_back(ledger.jobs["exp"]) is None
    assert ids(ledger) == [0, 1], "the bound on the object store frees nothing that lies elsewhere"
    assert ledger.rollouts.vault_lost("v1") == {}
    attach(ledger, "c2", ray_job="other")
    ledger.end("c", "dead", "")
    assert ledger.resume("c2", 0)["again"] == [0, 1]
    assert ledger.claim("c2", 0).payload.stored == "n0"


def test_where_the_prompts_stood_leaves_the_object_store_with_it(ledger):
    attach_pair(ledger, retain=5, store="memory://x")
    publish(ledger, 0, stored="n0", source={"n": 1}, source_apart=True)
    train(ledger, 0)
    assert ledger.garbage.take_drops() == [("v1/a", "t0"), ("v1/a", "t0.source")]
    before = ledger.source_before("p", 1)[1]
    assert (before.vault, before.stored, before.source_apart) == ("", "n0", True), "it is read from the store"
    publish(ledger, 0, "t1", stored="n1", vault="v2/a")
    again = restarted(ledger, *[v for v in ledger.versions("exp", 0) if v.payload.vault])
    assert again.source_before("p", 1)[1].token == "t1", "the newest generation says where it ended"


def test_a_retry_after_it_left_the_object_store_makes_no_second_version(ledger):
    attach_pair(ledger, retain=5, store="memory://x")
    publish(ledger, 0, stored="n0")
    train(ledger, 0)
    ledger.garbage.take_drops()
    located = publish(ledger, 0, stored="n0-again", vault="v1/b")
    assert (located.version, located.payload.vault, located.payload.stored) == (1, "", "n0")
    assert len(ledger.versions("exp", 0)) == 1
    assert ledger.garbage.take_drops() == [("v1/b", "t0")]
    assert ledger.garbage.take_store_drops() == [("exp", "n0-again")]


def test_a_retry_by_a_vault_that_was_restarted_makes_no_second_version(ledger):
    """What is stored does not go with its vault, so the version is there still."""
    attach_pair(ledger, store="memory://x")
    publish(ledger, 0, stored="n0", source={"n": 1}, source_apart=True)
    assert ledger.rollouts.vault_lost("v1", "b") == {}
    located = publish(ledger, 0, stored="n0-again", vault="v1/b", source={"n": 1}, source_apart=True)
    assert (located.version, located.payload.vault, located.payload.stored) == (1, "v1/b", "n0-again")
    assert len(ledger.versions("exp", 0)) == 1
    assert ledger.garbage.take_drops() == [], "the new one holds it under the same token"
    assert ledger.garbage.take_store_drops() == [("exp", "n0"), ("exp", "n0-source")]
    assert ledger.source_before("p", 1)[1].stored == "n0-again"


def test_what_was_acked_before_it_was_thrown_away_is_freed_when_it_comes_again(ledger):
    """Too stale for one group while another one held it, which then acked it; published anew for nobody any more."""
    attach_pair(ledger, max_staleness=0, on_stale="drop")
    attach(ledger, "ca", group="archive")
    publish(ledger, 0, weight_version=0)
    ledger.claim("c", 0)
    weights(ledger, 1)
    assert ledger.claim("ca", 0) is None
    ledger.ack("c", 0)
    ledger.end("ca", "finished")
    publish(ledger, 0, "t0-again", weight_version=1)
    assert figures(ledger, "retained", "queue_depth", "freed") == [0, 0, 1]


# ---------------------------------------------------------------------- where no group reads: from publication


def test_what_no_group_reads_is_retained_from_publication_by_number_bytes_and_age(ledger, clock):
    attach(ledger, "p", retain=3, retain_s=100.0, retain_bytes=35, retain_from="publication")
    publish_each(ledger, *range(200))
    assert ids(ledger) == [197, 198, 199]
    assert figures(ledger, "retained", "held_bytes", "queue_depth", "dropped") == [3, 30, 0, 197]
    assert len(ledger.garbage.take_drops()) == 197
    publish(ledger, 200, nbytes=20)
    assert ids(ledger) == [199, 200]
    publish(ledger, 201, nbytes=1000)
    assert ids(ledger) == [201], "the newest stays, however large"
    clock.now += 101
    assert ledger.lifetime.expire() == ["exp"]
    assert ids(ledger) == []
    assert ledger.jobs["exp"].progress[201].state == "dropped"
    with pytest.raises(RolloutNotFound, match="rollout 201 of job exp was freed, as its retention says"):
        ledger.get("exp", 201)
    with pytest.raises(Refused, match="was freed, as its retention says: it is not taken again"):
        publish(ledger, 201, "again")


def test_the_bound_on_the_object_store_holds_where_nobody_acks(ledger):
    attach(ledger, "p", max_bytes=25, retain=100, retain_from="publication")
    for rollout_id in range(50):
        publish(ledger, rollout_id)
        assert ledger.pacing.held_back(ledger.jobs["exp"]) is None, "the oldest goes, nobody waits"
    assert ids(ledger) == [48, 49]
    publish(ledger, 50, nbytes=26)
    assert ids(ledger) == [50]


def test_a_reading_counts_as_an_ack(ledger, clock):
    attach(ledger, "p", retain=2, retain_s=100.0, retain_from="publication")
    publish(ledger, 0)
    publish(ledger, 1)
    clock.now += 60
    assert ledger.read("exp", 0).payload.token == "t0"
    publish(ledger, 2)
    assert ids(ledger) == [0, 2], "the one that was read is newer than the one that was not"
    clock.now += 60
    ledger.lifetime.expire()
    assert ids(ledger) == [0, 2], "read 60 s ago, published 60 s ago"
    publish(ledger, 3)
    publish(ledger, 4)
    assert figures(ledger, "claimed", "acked", "dropped") == [1, 1, 2]
    assert [ledger.jobs["exp"].progress[r].state for r in range(3)] == ["freed", "dropped", "dropped"]


def test_a_group_that_attaches_decides_from_then_on(ledger):
    attach(ledger, "p", retain=2, retain_from="publication")
    publish_each(ledger, *range(3))
    attach(ledger, "c")
    publish_each(ledger, *range(3, 8))
    assert ids(ledger) == [1, 2, 3, 4, 5, 6, 7], "what it has not acked stays"
    ledger.resume("c", 0)
    train(ledger, *range(1, 8))
    assert ids(ledger) == [6, 7]
    assert ledger.read("exp", 6).version == 1
    publish(ledger, 8)
    ledger.end("c", "finished")
    assert ids(ledger) == [7, 8], "it reads no more: 8 is retained from publication"


def test_without_saying_so_nothing_is_freed_that_nobody_acked(ledger, clock):
    attach(ledger, "p", retain=1, retain_s=1.0, retain_bytes=1)
    publish_each(ledger, *range(5))
    clock.now += 1000
    assert ledger.lifetime.expire() == []
    assert ledger.read("exp", 0).rollout_id == 0
    assert len(ids(ledger)) == 5


def test_a_job_that_no_group_reads_is_complete_when_nothing_of_it_is_left(ledger, clock):
    attach(ledger, "p", retain_s=100.0, retain_from="publication")
    publish_each(ledger, *range(5))
    ledger.end("p", "finished")
    assert (ids(ledger), figures(ledger, "complete")) == ([0, 1, 2, 3, 4], [False]), "it can be got after its producer"
    clock.now += 101
    assert ledger.lifetime.expire() == ["exp"]
    assert figures(ledger, "complete", "retained") == [True, 0]
    assert len(ledger.garbage.take_drops()) == 5


def test_what_a_group_that_came_and_went_left_is_retained_after_the_producer_too(ledger, clock):
    attach_pair(ledger, retain=3, retain_s=100.0, retain_from="publication")
    publish_each(ledger, *range(5))
    train(ledger, 0)
    ledger.end("c", "finished")
    ledger.end("p", "finished")
    assert (ids(ledger), figures(ledger, "complete")) == ([2, 3, 4], [False])
    assert ledger.read("exp", 2).payload.token == "t2"
    clock.now += 101
    assert ledger.lifetime.expire() == ["exp"]
    assert (ids(ledger), figures(ledger, "complete")) == ([], [True])


def test_what_no_group_reads_outlives_the_broker(ledger, clock):
    attach(ledger, "p", retain=3, retain_from="publication")
    publish_each(ledger, *range(5))
    ledger.read("exp", 2)
    again = restarted(ledger, *[v for r in (2, 3, 4) for v in ledger.versions("exp", r)])
    assert [*again.jobs["exp"].done] == [3, 4, 2]
    publish(again, 5)
    assert ids(again) == [2, 4, 5]
