"""Promises of a ledger that is made again, which test_ledger_model.py found broken, each in the fewest steps."""

import pytest

from slime.cross_job.errors import NotOwner, PayloadLost
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.snapshot import restore
from slime.cross_job.types import LocatedValue, Payload
from tests.support.ledger import attach, attach_pair, ends_at, publish, publish_each, remembered, restarted, train


def put(ledger: Ledger, key: str, version: int) -> LocatedValue:
    return ledger.put_value("c", key, Payload(f"{key}{version}", "v1/a", 1), version)


def test_what_is_to_be_generated_again_was_not_lost_by_a_restart(ledger):
    attach_pair(ledger, max_staleness=0, on_stale="regenerate")
    publish(ledger, 0, weight_version=0)
    weights = put(ledger, "weights", 1)
    assert ledger.claim("c", 0) is None
    again = restarted(ledger, weights)
    assert again.next_demand("p") == 0
    status = again.status("exp")["exp"]
    assert (status["lost"], status["losses"], status["regenerated"]) == ([], 0, 1)


def test_a_job_that_is_complete_lost_nothing_by_a_restart(pair):
    publish(pair, 0)
    pair.rollouts.payload_lost("exp", "t0")
    pair.end("p", "finished")
    pair.end("c", "finished")
    status = restarted(pair).status("exp")["exp"]
    assert (status["complete"], status["lost"], status["losses"]) == (True, [], 1)


def test_a_rollout_that_was_given_up_does_not_come_back_with_a_vault_that_was_not_told(ledger):
    attach_pair(ledger, max_staleness=0, on_stale="regenerate")
    stale = publish(ledger, 0, weight_version=0)
    weights = put(ledger, "weights", 1)
    assert ledger.claim("c", 0) is None
    again = restarted(ledger, stale, weights)
    assert again.catalog() == []
    assert again.garbage.take_drops() == [("v1/a", "t0")]
    assert again.next_demand("p") == 0


def test_a_value_that_was_replaced_does_not_come_back_when_the_newest_is_lost(ledger):
    attach(ledger, "c")
    old = put(ledger, "weights", 1)
    put(ledger, "weights", 2)
    again = restarted(ledger, old)
    assert again.get_value("exp", "weights") is None
    assert again.garbage.take_drops() == [("v1/a", "weights1")]


def test_nothing_of_a_job_that_was_complete_comes_back_in_the_next_one_of_its_name(pair):
    old = publish(pair, 0)
    train(pair, 0)
    pair.end("p", "finished")
    pair.end("c", "finished")
    attach(pair, "p2")
    again = restarted(pair, old)
    assert again.catalog() == []
    assert again.garbage.take_drops() == [("v1/a", "t0")]


def test_what_was_given_back_is_not_given_back_twice_when_the_answer_was_lost(ledger):
    for name in ("p", "c", "c2"):
        attach(ledger, name)
    located = publish(ledger, 0)
    for n in range(2):
        ledger.claim("c", 0)
        ledger.release("c", 0, token=(token := f"r{n}"))
    again = restarted(ledger, located)
    again.release("c", 0, token=token)
    again.claim("c2", 0)
    again.release("c", 0, token=token)
    assert again.status("exp")["exp"]["requeued"] == 2
    with pytest.raises(NotOwner, match="leased by the consumer"):
        again.release("c", 0, token="another")


def test_what_was_lost_and_published_again_is_there_after_a_restart(pair):
    publish(pair, 0)
    pair.rollouts.payload_lost("exp", "t0")
    retried = publish(pair, 0)  # the same token: the vault was restarted, and called the method again
    assert [located.payload.token for located in restarted(pair, retried).catalog()] == ["t0"]


def test_where_a_source_stood_is_not_remembered_again_by_a_restart(pair):
    located = [publish(pair, rollout_id, source={"at": rollout_id}) for rollout_id in range(3)]
    for rollout_id in (0, 2):
        train(pair, rollout_id)
    assert [*restarted(pair, located[1]).jobs["exp"].sources] == [*pair.jobs["exp"].sources] == [0, 2]


def test_a_value_that_was_put_after_the_job_was_complete_is_there_after_a_restart(ledger):
    for name in ("p", "c", "w"):
        attach(ledger, name)
    for name in ("p", "c"):
        ledger.end(name, "finished")
    value = ledger.put_value("w", "tokenizer", Payload("v0", "v1/a", 1))
    assert restarted(ledger, value).get_value("exp", "tokenizer") == value


def test_what_a_vault_that_was_silent_at_a_restart_has_of_before_does_not_come_back(pair):
    """Its rollout counted as lost, was generated again, trained on and freed."""
    old = publish(pair, 0, "old", source="after 0")
    again = restarted(pair)
    assert again.status("exp")["exp"]["lost"] == [0]
    publish(again, 0, "new", vault="v2/a", source="after 0")
    publish(again, 1, vault="v2/a", source="after 1")
    train(again, 0, 1)
    last = publish(again, 2, vault="v2/a", source="after 2")
    assert ends_at(again, 3) == (3, "after 2")
    third = restarted(again, old, last)
    assert [located.rollout_id for located in third.catalog()] == [2]
    assert ends_at(third, 3) == (3, "after 2")
    assert ("v1/a", "old") in third.garbage.take_drops()


def test_a_claim_that_is_asked_for_again_is_answered_as_long_as_it_is_held(pair):
    publish_each(pair, *range(2))
    first = pair.claim("c", token="once")
    assert pair.claim("c", token="once") == first
    pair.release("c", 0)
    pair.claim("c", 0)
    pair.ack("c", 0)
    assert pair.claim("c", token="once").rollout_id == 1, "what it holds no more is not handed out again"


def test_a_memory_that_is_older_than_what_vaults_hold_is_not_trusted_with_prompts(pair, caplog):
    """The newest copy died with the broker's node: prompts would be used twice, without a word."""
    for rollout_id in range(2):
        publish(pair, rollout_id, source=f"after {rollout_id}")
    old = remembered(pair)
    publish(pair, 2, source="after 2")
    held = put(pair, "weights", 3)
    again = Ledger(lambda: 1000.0, wall=lambda: 1000.0)
    restore(again, old, [held])
    assert "no vault that answered knows what its broker was told last" in caplog.text
    with pytest.raises(PayloadLost, match="Start the train job again from a checkpoint that knows it"):
        again.source_before("p", 2)
    again.resume("c", 3, source="after 2, says the checkpoint")
    assert ends_at(again, 3) == (1, "after 2, says the checkpoint")
    third = restarted(again, held)
    assert ends_at(third, 3) == (1, "after 2, says the checkpoint")


def test_where_the_source_stood_in_a_history_that_is_over_is_forgotten_and_freed(pair):
    """What lies above the checkpoint was not generated in the history that goes on."""
    for rollout_id in range(3):
        publish(pair, rollout_id, source_apart=True, stored=f"n{rollout_id}")
    job = pair.jobs["exp"]
    job.gap = True
    told = {source.stored for source in job.sources.values()}
    assert told == {"n0", "n1", "n2"}
    pair.garbage.take_drops()
    pair.garbage.take_store_drops()
    pair.resume("c", 1, source="after 0, says the checkpoint")
    assert [source.source for source in job.sources.values()] == ["after 0, says the checkpoint"]
    assert ends_at(pair, 1) == (1, "after 0, says the checkpoint")
    assert ends_at(pair, 2) == (1, "after 0, says the checkpoint"), "not where its first generation began"
    freed = {name for _, name in pair.garbage.take_store_drops()}
    assert freed >= {f"{name}-source" for name in told}
    assert {token for _, token in pair.garbage.take_drops()} >= {f"t{rollout_id}.source" for rollout_id in range(3)}
