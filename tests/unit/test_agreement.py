"""What clients must agree on besides settings: terms of the data, columns; and consumer groups that are given up."""

import pytest

from slime.cross_job.errors import Fenced, GroupNotFound, Refused
from slime.cross_job.types import Payload
from tests.support.ledger import attach, figures, publish, train

DATA = {"tokenizer": "abc", "seed": 1}


def test_terms_of_the_data_hold_as_long_as_rollouts_are_left_of_who_ended(ledger):
    attach(ledger, "p", terms=DATA, lasting=["tokenizer"])
    attach(ledger, "c")
    publish(ledger, 0)
    ledger.end("p", "failed", "boom")
    ledger.end("c", "stopped")
    for name in ("c2", "p2"):
        with pytest.raises(
            Refused, match=r"which has left rollout 0, disagree: tokenizer is 'xyz' here and 'abc' there"
        ):
            attach(ledger, name, terms={"tokenizer": "xyz", "seed": 2}, lasting=["tokenizer"])
    attach(ledger, "c3", terms={"tokenizer": "abc", "seed": 2}, lasting=["tokenizer"])
    train(ledger, 0, consumer="c3")
    ledger.end("c3", "stopped")
    attach(ledger, "c4", terms={"tokenizer": "xyz"}, lasting=["tokenizer"])


@pytest.mark.parametrize(("comes", "ray_job"), [("p2", "r-p2"), ("c", "r-c"), ("p2", "r-p")])
def test_terms_hold_for_what_is_left_of_a_producer_that_would_be_ended_for_whom_comes(ledger, clock, comes, ray_job):
    attach(ledger, "p", terms=DATA, lasting=["tokenizer"])
    publish(ledger, 0)
    if ray_job != "r-p":
        clock.now += 31
        ledger.membership.tick()
    with pytest.raises(Refused, match=r"which has left rollout 0, disagree: tokenizer is 'xyz' here and 'abc' there"):
        attach(ledger, comes, ray_job=ray_job, terms={"tokenizer": "xyz"}, lasting=["tokenizer"])
    assert ledger.clients["p"].attached
    attach(ledger, comes, ray_job=ray_job, terms={"tokenizer": "abc", "seed": 2}, lasting=["tokenizer"])


def test_a_consumer_that_needs_columns_which_no_batch_has_is_refused_before_anything_is_generated(ledger):
    attach(ledger, "p", columns=["tokens", "rewards"])
    with pytest.raises(Refused, match=r"have columns tokens, rewards; .* needs tokens, log_probs: log_probs missing"):
        attach(ledger, "c", columns=["tokens", "log_probs"])
    attach(ledger, "c", columns=["tokens"])


def test_a_producer_whose_batches_lack_what_a_consumer_needs_is_refused(ledger):
    attach(ledger, "c", columns=["tokens", "log_probs"])
    with pytest.raises(Refused, match=r"the consumer of job exp .* needs tokens, log_probs: log_probs missing"):
        attach(ledger, "p", columns=["tokens"])
    attach(ledger, "p", columns=["log_probs", "more", "tokens"])


def test_what_is_published_tells_the_columns_too(ledger):
    attach(ledger, "p")
    publish(ledger, 0, columns=("tokens",))
    with pytest.raises(Refused, match="have columns tokens; this consumer needs log_probs: log_probs missing"):
        attach(ledger, "c", columns=["log_probs"])


def test_a_group_that_will_not_come_back_is_closed_and_holds_nothing_back(ledger):
    attach(ledger, "p")
    attach(ledger, "c")
    attach(ledger, "c2", group="archive")
    for rollout_id in range(2):
        publish(ledger, rollout_id)
    train(ledger, 0, 1)
    with pytest.raises(Refused, match="group 'archive' of job exp is in use"):
        ledger.close_group("exp", "archive")
    ledger.end("c2", "dead", "its node died")
    assert figures(ledger, "retained") == [2]
    assert ledger.close_group("exp", "archive") == [0, 1]
    assert figures(ledger, "retained", "freed") == [0, 2]
    assert ledger.close_group("exp", "archive") == []
    with pytest.raises(GroupNotFound, match="no consumer group 'other'; it has train, archive"):
        ledger.close_group("exp", "other")


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger: ledger.ack("c", 0),
        lambda ledger: ledger.release("c", 0),
        lambda ledger: ledger.demand("c", 1),
        lambda ledger: ledger.begin_update("c"),
        lambda ledger: ledger.end_update("c", 1, 1),
        lambda ledger: ledger.break_update("c"),
        lambda ledger: ledger.resume("c", 0),
        lambda ledger: publish(ledger, 1),
        lambda ledger: ledger.next_demand("p"),
        lambda ledger: ledger.put_value("c", "weights", Payload("w", "v1/a", 1), 1),
        lambda ledger: ledger.announce("c", {}),
    ],
)
def test_a_zombie_can_neither_publish_nor_ack_nor_update_weights(ledger, clock, act):
    """It was silent longer than its lease, and wakes up when others have taken its place."""
    attach(ledger, "p", dead_after_s=5)
    attach(ledger, "c", dead_after_s=5)
    publish(ledger, 0)
    ledger.claim("c", 0)
    clock.now += 1
    ledger.membership.tick()
    for _ in range(3):
        clock.now += 3
        ledger.membership.tick()
    attach(ledger, "p2")
    assert ledger.first(attach(ledger, "c2"))
    before = figures(ledger, "published", "acked", "leased", "weight_version")
    with pytest.raises(Fenced, match=r"was ended \(dead: .* after .* s without a sign of life\)"):
        act(ledger)
    assert figures(ledger, "published", "acked", "leased", "weight_version") == before


def test_columns_of_what_is_only_retained_bind_nobody(ledger):
    attach(ledger, "p", retain=2)
    attach(ledger, "c")
    publish(ledger, 0, columns=("a",))
    train(ledger, 0)
    for name in ("p", "c"):
        ledger.end(name, "stopped")
    attach(ledger, "p2", columns=["a", "b"])
    attach(ledger, "c2", columns=["a", "b"])
