"""What is delivered when training goes back to a checkpoint, and when vaults die; from which prompts."""

import pytest

from slime.cross_job.errors import BadInput, Fenced, JobIdTaken, NotOwner, Refused, RolloutNotFound, ValueLost
from slime.cross_job.types import Payload
from tests.support.ledger import attach, ends_at, figures, publish, train, weights

# ---------------------------------------------------------------------- training goes back to a checkpoint


def test_what_was_acked_after_the_checkpoint_is_delivered_again_the_same_bytes(ledger):
    attach(ledger, "p", retain=5)
    attach(ledger, "c")
    for rollout_id in range(4):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    ledger.end("c", "dead", "killed")
    attach(ledger, "c2")
    assert ledger.resume("c2", 2) == {"again": [2, 3], "acked": []}
    assert [ledger.claim("c2").payload.token for _ in range(2)] == ["t2", "t3"]
    assert ledger.claim("c2") is None
    assert figures(ledger, "rewound", "retained") == [1, 4]


def test_what_the_checkpoint_covers_is_acked_although_it_was_never_acked(pair):
    for rollout_id in range(3):
        publish(pair, rollout_id)
    pair.claim("c", 0)
    assert pair.resume("c", 2) == {"again": [], "acked": [0, 1]}
    assert pair.garbage.take_drops() == [("v1/a", "t0"), ("v1/a", "t1")]
    assert pair.claim("c").rollout_id == 2
    assert figures(pair, "covered", "rewound", "acked", "requeued") == [2, 0, 0, 1]


def test_what_the_checkpoint_covers_and_is_lost_is_not_generated_again(pair):
    publish(pair, 0)
    publish(pair, 1)
    pair.rollouts.payload_lost("exp", "t0")
    assert pair.resume("c", 1)["acked"] == [0]
    assert figures(pair, "lost", "freed") == [[], 1]


def test_what_the_checkpoint_covers_is_not_handed_out_when_it_is_published_late(pair):
    pair.resume("c", 2)
    publish(pair, 0)
    assert pair.claim("c") is None
    assert figures(pair, "covered", "freed", "queue_depth") == [1, 1, 0]
    with pytest.raises(RolloutNotFound, match="resumed at rollout 2"):
        pair.claim("c", 1)
    attach(pair, "ca", group="archive")
    publish(pair, 1)
    assert pair.claim("ca").rollout_id == 1
    assert pair.claim("c") is None


def test_who_resumes_fences_those_of_another_history(pair):
    attach(pair, "c1", ray_job="r-new")
    attach(pair, "ca", group="archive")
    pair.end("c", "dead", "killed")
    publish(pair, 0)
    pair.claim("c1", 0)
    attach(pair, "c2", ray_job="r-new")
    pair.resume("c2", 0)
    with pytest.raises(Fenced, match="resumed its group at rollout 0"):
        pair.ack("c1", 0)
    assert pair.claim("c2").rollout_id == 0
    pair.heartbeat("ca", "of another group")


def test_nobody_resumes_under_a_consumer_of_another_ray_job_that_lives(pair, clock):
    attach(pair, "c2")
    clock.now += 3
    with pytest.raises(JobIdTaken, match="is alive") as raised:
        pair.resume("c2", 0)
    assert raised.value.silent_s == 3.0
    pair.heartbeat("c", "still here")
    pair.end("c", "stopped")
    assert pair.resume("c2", 0) == {"again": [], "acked": []}


def test_a_checkpoint_older_than_what_was_freed_is_refused_and_nothing_changes(pair):
    for rollout_id in range(3):
        publish(pair, rollout_id)
    train(pair, 0, 1)
    pair.claim("c", 2)
    with pytest.raises(RolloutNotFound, match=r"cannot go back to rollout 1: .*--load.*--cross-job-retain.*--job-id"):
        pair.resume("c", 1)
    pair.ack("c", 2)  # its lease is as it was
    assert figures(pair, "acked", "rewound", "covered") == [3, 0, 0]


def test_a_second_consumer_of_another_ray_job_is_told_before_it_does_anything(pair, clock):
    attach(pair, "c2", ray_job="r-new")
    clock.now += 3
    with pytest.raises(JobIdTaken, match="is alive") as told:
        pair.first("c2")
    assert told.value.silent_s == 3
    assert pair.first("c"), "it was there before"
    pair.end("c", "dead", "killed")
    assert pair.first("c2")


def test_resuming_twice_is_once(pair):
    publish(pair, 0)
    assert pair.resume("c", 1) == {"again": [], "acked": [0]}
    assert pair.resume("c", 1) == {"again": [], "acked": []}
    assert figures(pair, "covered") == [1]


def test_what_the_old_history_demanded_is_not_generated_for_the_new_one(ledger):
    attach(ledger, "p", max_ahead=1)
    attach(ledger, "c")
    ledger.demand("c", 7)
    ledger.resume("c", 3)
    assert figures(ledger, "last_demanded") == [-1]
    assert ledger.next_demand("p") is None
    ledger.demand("c", 3)
    assert ledger.next_demand("p") == 3


def test_what_another_group_demanded_stands_when_one_resumes(pair):
    attach(pair, "ca", group="archive")
    pair.demand("c", 1)
    pair.demand("ca", 5)
    pair.resume("c", 0)
    assert figures(pair, "last_demanded") == [5]
    assert pair.next_demand("p") == 1


def test_another_group_keeps_what_it_acked_and_holds(pair):
    attach(pair, "ca", group="archive")
    for rollout_id in range(2):
        publish(pair, rollout_id)
        pair.claim("ca", rollout_id)
        pair.claim("c", rollout_id)
    pair.ack("ca", 0)
    pair.ack("c", 1)
    assert pair.resume("c", 0)["again"] == [1]
    with pytest.raises(RolloutNotFound, match="acked by group 'archive'"):
        pair.claim("ca", 0)
    pair.ack("ca", 1)
    assert pair.garbage.take_drops() == []
    train(pair, 0, 1)
    assert len(pair.garbage.take_drops()) == 2


def test_weights_may_go_back_once_their_author_is_over(pair):
    weights(pair, 5)
    with pytest.raises(Refused, match="not newer than 5"):
        weights(pair, 3)
    attach(pair, "c2")
    with pytest.raises(Refused, match="not newer than 5"):
        weights(pair, 3, author="c2")
    pair.end("c", "dead", "killed")
    weights(pair, 3, author="c2")
    assert pair.get_value("exp", "weights").version == 3
    assert ("v1/a", "w5-c") in pair.garbage.take_drops()


def test_a_rollout_that_the_void_history_generated_is_not_taken(pair):
    weights(pair, 5)
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0
    pair.end("c", "dead", "killed")
    attach(pair, "c2")
    pair.resume("c2", 0)
    weights(pair, 2, author="c2")
    assert publish(pair, 0, weight_version=2).version == 0
    assert figures(pair, "published", "retained") == [0, 0]


# ---------------------------------------------------------------------- a vault dies


def test_a_vault_that_died_takes_what_it_held_and_nothing_else(pair):
    attach(pair, "ca", group="archive")
    publish(pair, 0, vault="v1/a")
    publish(pair, 1, vault="v2/a")
    publish(pair, 2, vault="v1/b")
    weights(pair, 1)
    assert pair.rollouts.vault_lost("v1", "b") == {"exp": ["rollout 0 version 1", "weights version 1"]}
    assert pair.rollouts.vault_lost("v1", "b") == {}
    assert [located.rollout_id for located in pair.catalog()] == [1, 2]
    assert pair.get_value("exp", "weights") is None
    assert pair.rollouts.vaults() == {"v1", "v2"}
    assert figures(pair, "lost", "losses", "held_bytes") == [[0], 1, 20]
    with pytest.raises(RolloutNotFound, match="lost with its vault: demand it"):
        pair.get("exp", 0)
    assert pair.garbage.take_drops() == []  # there is nothing to be freed


def test_what_is_lost_is_generated_again_when_it_is_demanded(pair):
    publish(pair, 0)
    assert pair.rollouts.payload_lost("exp", "t0") == "rollout 0 version 1"
    assert pair.rollouts.payload_lost("exp", "t0") is None
    assert pair.next_demand("p") is None
    pair.demand("c", 0)
    assert pair.next_demand("p") == 0
    assert publish(pair, 0, "again", vault="v1/b").version == 2
    assert pair.claim("c").payload.token == "again"
    assert figures(pair, "lost", "losses", "republished") == [[], 1, 1]


def test_a_consumer_that_cannot_read_its_rollout_gets_it_again(pair):
    publish(pair, 0)
    pair.claim("c")
    pair.rollouts.payload_lost("exp", "t0")
    pair.unreadable("c", 0)
    with pytest.raises(NotOwner):
        pair.ack("c", 0)
    assert pair.next_demand("p") == 0
    publish(pair, 0, "again")
    assert pair.claim("c").payload.token == "again"


@pytest.mark.parametrize("demanded", [False, True])
def test_what_was_read_before_it_was_lost_can_be_acked_and_is_not_generated(pair, demanded):
    publish(pair, 0)
    pair.claim("c", 0)
    pair.rollouts.payload_lost("exp", "t0")
    if demanded:
        pair.demand("c", 0)
    pair.ack("c", 0)
    assert figures(pair, "acked", "lost", "freed") == [1, [], 1]
    assert pair.next_demand("p") is None


def test_what_every_group_has_acked_is_not_missed(ledger):
    attach(ledger, "p", retain=3)
    attach(ledger, "c")
    publish(ledger, 0)
    train(ledger, 0)
    ledger.rollouts.vault_lost("v1")
    assert figures(ledger, "lost", "losses", "freed", "queue_depth") == [[], 0, 0, 0]
    ledger.demand("c", 0)
    assert ledger.next_demand("p") is None


def test_what_was_lost_after_it_was_acked_is_generated_again_for_a_training_that_goes_back(ledger):
    attach(ledger, "p", retain=3)
    attach(ledger, "c")
    for rollout_id in range(3):
        publish(ledger, rollout_id, source=rollout_id)
        train(ledger, rollout_id)
    ledger.rollouts.vault_lost("v1")
    attach(ledger, "c2", ray_job="r-c")
    assert ledger.resume("c2", 1) == {"again": [1, 2], "acked": []}
    assert figures(ledger, "lost", "losses") == [[1, 2], 2]
    assert ledger.claim("c2", 1) is None
    assert ledger.next_demand("p") == 1
    assert ends_at(ledger, 1) == (1, 0), "from the same prompts"
    publish(ledger, 1, "again")
    assert ledger.claim("c2", 1).payload.token == "again"


def test_who_comes_after_a_rollout_was_acked_and_lost_never_gets_it(ledger):
    attach(ledger, "p", retain=3)
    attach(ledger, "c")
    publish(ledger, 0)
    train(ledger, 0)
    ledger.rollouts.vault_lost("v1")
    attach(ledger, "ca", group="archive")
    assert figures(ledger, "lost", "freed") == [[], 1]


def test_an_older_version_stays_when_the_newest_is_lost(pair):
    publish(pair, 0, "first", vault="v1/a")
    publish(pair, 0, "second", vault="v2/a")
    pair.rollouts.vault_lost("v2")
    assert pair.claim("c", 0).payload.token == "first"
    with pytest.raises(RolloutNotFound, match=r"versions? 1, not 2"):
        pair.get("exp", 0, 2)
    assert figures(pair, "lost", "losses") == [[], 0]


def test_a_retry_of_what_went_with_its_vault_is_there_again_under_its_number(pair):
    assert publish(pair, 0, "same", vault="v1/a").version == 1
    pair.rollouts.vault_lost("v1", "b")
    assert publish(pair, 0, "same", vault="v1/b").version == 1
    assert pair.claim("c", 0).payload.vault == "v1/b"
    assert figures(pair, "published", "lost") == [1, []]


# ---------------------------------------------------------------------- where the source of prompts stands


def test_each_generation_begins_where_the_one_before_it_ended(pair):
    assert ends_at(pair, 0) == (0, None)
    publish(pair, 0, source="after 0")
    assert ends_at(pair, 1) == (1, "after 0")
    publish(pair, 1, source="after 1")
    assert ends_at(pair, 2) == ends_at(pair, 9) == (2, "after 1")
    train(pair, 0, 1)
    assert ends_at(pair, 2) == (2, "after 1")


def test_the_order_is_that_of_generation_not_of_the_ids(pair):
    publish(pair, 5, source="after 5")
    publish(pair, 2, source="after 2")
    assert ends_at(pair, 2) == (1, "after 5")
    assert ends_at(pair, 5) == (0, None)
    assert ends_at(pair, 3) == (2, "after 2")


def test_what_was_lost_is_generated_from_the_same_prompts(pair):
    for rollout_id in range(3):
        publish(pair, rollout_id, source=f"after {rollout_id}")
    pair.rollouts.payload_lost("exp", "t1")
    assert ends_at(pair, 1) == (1, "after 0")
    assert ends_at(pair, 3) == (3, "after 2")
    publish(pair, 1, "again", source="after 1")
    assert ends_at(pair, 2) == (2, "after 1")
    assert ends_at(pair, 3) == (3, "after 2")


def test_another_producer_goes_on_where_the_last_one_stood(pair):
    publish(pair, 0, source="after 0")
    publish(pair, 1, source="after 1")
    pair.rollouts.payload_lost("exp", "t1")
    pair.end("p", "dead", "killed")
    attach(pair, "p2")
    assert ends_at(pair, 1, "p2") == (1, "after 0")
    assert ends_at(pair, 2, "p2") == (2, "after 1")


def test_a_large_source_is_freed_when_no_generation_can_begin_there_any_more(pair):
    for rollout_id in range(2):
        publish(pair, rollout_id, source_apart=True)
    train(pair, 0)
    assert pair.garbage.take_drops() == [("v1/a", "t0")]  # rollout 1 may be generated again from there
    train(pair, 1)
    assert sorted(pair.garbage.take_drops()) == [("v1/a", "t0.source"), ("v1/a", "t1")]
    publish(pair, 2, source_apart=True)
    train(pair, 2)
    assert sorted(pair.garbage.take_drops()) == [("v1/a", "t1.source"), ("v1/a", "t2")]


# ---------------------------------------------------------------------- values go with their vault, too


def test_who_waits_while_its_weights_are_lost_is_told_to_publish_them_again(pair):
    attach(pair, "ca", group="archive")
    weights(pair, 3)
    assert pair.rollouts.vault_lost("v1") == {"exp": ["weights version 3"]}
    for rollout_id in (0, None):
        with pytest.raises(ValueLost, match=r"weights version 3 .* publish it again"):
            pair.claim("c", rollout_id)
    assert pair.claim("ca") is None, "it did not publish them"
    publish(pair, 0)
    assert pair.claim("c", 0).rollout_id == 0, "nobody waits"
    weights(pair, 3)
    assert pair.claim("c", 1) is None


def test_before_anything_is_published_the_newest_checkpoint_says_where_the_source_stands(pair):
    """A train job goes back to an older checkpoint, or to the beginning, before the first rollout."""
    pair.resume("c", 11, source="after 10")
    assert ends_at(pair, 11) == (1, "after 10")
    pair.resume("c", 6, source="after 5")
    assert ends_at(pair, 6) == (1, "after 5")
    pair.resume("c", 0)
    assert ends_at(pair, 0) == (0, None)
    pair.resume("c", 6, source="after 5")
    publish(pair, 6, source="after 6")
    pair.resume("c", 6, source="after 5, says the checkpoint")
    assert ends_at(pair, 7) == (2, "after 6")


def test_a_large_source_of_a_checkpoint_lies_in_a_vault_as_long_as_it_counts(pair):
    def large(number: int) -> Payload:
        return Payload(f"s{number}", "v1/a", 10**9, source_apart=True)

    pair.resume("c", 5, source=large(5))
    assert pair.source_before("p", 5) == (1, large(5))
    pair.resume("c", 4, source=large(4))
    assert pair.garbage.take_drops() == [("v1/a", "s5.source")]
    assert pair.source_before("p", 4) == (1, large(4))
    publish(pair, 4, source="after 4")
    pair.resume("c", 4, source=large(3))
    assert pair.garbage.take_drops() == [("v1/a", "s3.source")], "what was published says more"
    train(pair, 4)
    assert pair.garbage.take_drops() == [("v1/a", "t4"), ("v1/a", "s4.source")]
    with pytest.raises(BadInput, match="at most 65536"):
        pair.resume("c", 5, source="x" * 70_000)
