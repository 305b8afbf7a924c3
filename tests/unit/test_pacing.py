"""What holds generation back or ends it: old weights, short room, a wish to pause; who must agree, who is awaited."""

import pytest

from slime.cross_job.errors import BadInput, Drained, EndOfStream, PeerFailed, Refused, RolloutNotFound
from slime.cross_job.ledger import Ledger

from .ledger_hands import attach, ends_at, figures, publish, train, weights

# ---------------------------------------------------------------------- weights move on


def staleness(ledger: Ledger, how: str, most: int = 1, max_ahead: int = 0) -> None:
    attach(ledger, "p", max_staleness=most, on_stale=how, max_ahead=max_ahead)
    attach(ledger, "c")


@pytest.mark.parametrize("how", ["drop", "regenerate", "wait"])
def test_what_is_within_the_bound_is_delivered(ledger, how):
    staleness(ledger, how)
    publish(ledger, 0, weight_version=3)
    weights(ledger, 4)
    assert ledger.claim("c").rollout_id == 0


@pytest.mark.parametrize("made_by", [None, 3])
def test_without_knowing_both_weights_nothing_is_stale(ledger, made_by):
    staleness(ledger, "drop")
    publish(ledger, 0, weight_version=made_by)
    if made_by is None:
        weights(ledger, 9)
    assert ledger.claim("c").rollout_id == 0


def test_with_drop_a_stale_rollout_of_the_stream_is_skipped(ledger):
    staleness(ledger, "drop")
    publish(ledger, 0, weight_version=0)
    publish(ledger, 1, weight_version=1)
    weights(ledger, 2)
    assert ledger.claim("c").rollout_id == 1
    assert ledger.take_drops() == [("v1/a", "t0")]
    assert figures(ledger, "dropped", "regenerated", "freed", "losses") == [1, 0, 1, 0]


def test_with_drop_a_stale_rollout_that_is_asked_for_comes_from_new_prompts(ledger):
    staleness(ledger, "drop")
    for rollout_id in range(2):
        publish(ledger, rollout_id, weight_version=0, source=f"after {rollout_id}")
    weights(ledger, 2)
    assert ledger.claim("c", 0) is None
    assert ledger.next_demand("p") == 0
    assert ends_at(ledger, 0) == (2, "after 1")
    publish(ledger, 0, "fresh", weight_version=2)
    assert ledger.claim("c", 0).payload.token == "fresh"


@pytest.mark.parametrize("asked", [None, 0], ids=["next", "by id"])
def test_with_regenerate_a_stale_rollout_comes_from_the_same_prompts(ledger, asked):
    staleness(ledger, "regenerate")
    for rollout_id in range(2):
        publish(ledger, rollout_id, weight_version=2 * rollout_id, source=f"after {rollout_id}")
    weights(ledger, 2)
    found = ledger.claim("c", asked)
    assert found is None if asked == 0 else found.rollout_id == 1
    assert ledger.next_demand("p") == 0
    assert ends_at(ledger, 0) == (0, None)
    publish(ledger, 0, "fresh", weight_version=2)
    assert ledger.claim("c", asked).payload.token == "fresh"
    assert figures(ledger, "dropped", "regenerated") == [0, 1]


def test_what_is_claimed_is_not_taken_away_as_stale(ledger):
    staleness(ledger, "drop")
    publish(ledger, 0, weight_version=0)
    first = ledger.claim("c")
    weights(ledger, 9)
    assert ledger.claim("c", 0) == first
    ledger.ack("c", 0)


def test_with_wait_a_rollout_that_would_be_too_stale_is_generated_later(ledger):
    staleness(ledger, "wait", most=1, max_ahead=5)
    ledger.demand("c", 0)
    weights(ledger, 0)
    for expected in (0, 1):
        assert ledger.next_demand("p") == expected
        publish(ledger, expected, weight_version=0)
    assert ledger.next_demand("p") is None  # 2 is trained on with weights 2: these are two behind
    weights(ledger, 1)
    assert ledger.next_demand("p") == 2


def test_with_wait_what_is_demanded_is_generated_whatever_the_weights(ledger):
    staleness(ledger, "wait", most=0)
    weights(ledger, 0)
    ledger.demand("c", 3)
    assert ledger.next_demand("p") == 3


# ---------------------------------------------------------------------- room is short


def test_the_producer_waits_for_room_and_says_for_whom(ledger):
    attach(ledger, "p", max_bytes=25, max_ahead=9)
    attach(ledger, "c")
    ledger.demand("c", 0)
    for rollout_id in range(2):
        assert ledger.next_demand("p") == rollout_id
        publish(ledger, rollout_id)
    assert ledger.next_demand("p") is None
    for name in ("p", "c"):
        found = ledger.peer_verdict(name)
        assert found["kind"] == "full"
        assert "rollouts 0 to 1, 20 bytes, are not acked by train" in found["message"]
        assert "--cross-job-max-bytes 25" in found["message"]
    train(ledger, 0)
    assert ledger.next_demand("p") == 2


def test_one_rollout_that_is_larger_than_the_bound_is_taken(ledger):
    attach(ledger, "p", max_bytes=5)
    attach(ledger, "c")
    ledger.demand("c", 0)
    assert ledger.next_demand("p") == 0
    publish(ledger, 0)
    ledger.demand("c", 1)
    assert ledger.next_demand("p") is None
    train(ledger, 0)
    assert ledger.next_demand("p") == 1


def test_retention_yields_to_the_bound(ledger):
    attach(ledger, "p", max_bytes=20, retain=9)
    attach(ledger, "c")
    for rollout_id in range(3):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    assert [located.rollout_id for located in ledger.catalog()] == [1, 2]
    assert figures(ledger, "held_bytes") == [20]
    ledger.demand("c", 3)
    assert ledger.next_demand("p") == 3


# ---------------------------------------------------------------------- pause and drain


def test_a_paused_job_generates_nothing_and_delivers_what_is_there(pair):
    publish(pair, 0)
    pair.demand("c", 1)
    assert pair.control("exp", "paused") == "running"
    assert pair.next_demand("p") is None
    assert pair.peer_verdict("p")["kind"] == pair.peer_verdict("c")["kind"] == "paused"
    assert pair.claim("c").rollout_id == 0
    assert pair.control("exp", "running") == "paused"
    assert pair.next_demand("p") == 1


def test_a_drained_job_ends_both_streams_and_frees_nothing(pair):
    publish(pair, 0)
    publish(pair, 1)
    pair.demand("c", 2)
    pair.control("exp", "draining")
    with pytest.raises(EndOfStream, match="being drained"):
        pair.next_demand("p")
    pair.end("p", "finished")
    assert [pair.claim("c").rollout_id for _ in range(2)] == [0, 1]
    pair.ack("c", 0)
    with pytest.raises(EndOfStream, match="was drained"):
        pair.claim("c")
    pair.end("c", "finished")
    status = pair.status("exp")["exp"]
    assert (status["producer"]["state"], status["consumers"]["train"]["state"]) == ("stopped", "stopped")
    assert not status["complete"]
    assert [located.rollout_id for located in pair.catalog()] == [1]


def test_weights_are_not_waited_for_in_a_drained_job(pair):
    pair.announce("p", "engines")
    pair.control("exp", "draining")
    pair.end("p", "finished")
    for wait in (pair.begin_update, pair.facts, pair.loaded):
        with pytest.raises(Drained):
            wait("c", grace_s=1800)


def test_who_comes_after_a_drained_job_begins_again(pair):
    publish(pair, 0)
    pair.control("exp", "draining")
    attach(pair, "c2", group="archive")
    assert figures(pair, "control") == ["draining"]  # somebody of it lives
    for name in ("p", "c", "c2"):
        pair.end(name, "finished")
    attach(pair, "c3")
    assert figures(pair, "control") == ["running"]
    assert pair.claim("c3").rollout_id == 0


def test_nothing_else_can_be_wanted_of_a_job(pair):
    with pytest.raises(BadInput, match="'stopped' is none of 'running', 'paused', 'draining'"):
        pair.control("exp", "stopped")
    with pytest.raises(RolloutNotFound, match="no job 'other'"):
        pair.control("other", "paused")


# ---------------------------------------------------------------------- who must agree, who is waited for


def test_terms_that_differ_are_named_with_both_values(ledger):
    attach(ledger, "p", terms={"rollout_batch_size": 32, "hf_checkpoint": "/m/a", "seed": 1})
    with pytest.raises(Refused) as raised:
        attach(ledger, "c", terms={"rollout_batch_size": 16, "hf_checkpoint": "/m/b", "seed": 1, "lr": 3e-6})
    said = str(raised.value)
    assert "the producer of job exp" in said
    assert "rollout_batch_size is 16 here and 32 there" in said
    assert "hf_checkpoint is '/m/b' here and '/m/a' there" in said
    assert "seed" not in said
    assert "lr" not in said
    assert "c" not in ledger.clients


def test_settings_that_differ_are_named_by_their_flags(ledger):
    attach(ledger, "p", max_bytes=5, max_staleness=1, on_stale="drop")
    with pytest.raises(Refused) as raised:
        attach(ledger, "c", max_bytes=6, max_staleness=1, on_stale="wait")
    assert "--cross-job-max-bytes is 6 here and 5 there" in str(raised.value)
    assert "--cross-job-on-stale is wait here and drop there" in str(raised.value)
    assert "max-staleness" not in str(raised.value)


def test_terms_of_those_that_are_over_bind_nobody(ledger):
    attach(ledger, "p", terms={"seed": 1})
    ledger.end("p", "stopped")
    attach(ledger, "c", terms={"seed": 2})


def test_a_setting_that_is_none_is_refused(ledger):
    with pytest.raises(BadInput, match=r"max_ahed: no setting of a job; there are max_ahead, "):
        attach(ledger, "p", max_ahed=1)


@pytest.mark.parametrize("state", ["stopped", "failed", "dead"])
def test_a_producer_that_stopped_is_waited_for_as_long_as_one_that_failed(pair, clock, state):
    pair.end("p", state, "SIGTERM")
    assert pair.claim("c", 0, grace_s=60) is None
    clock.now += 61
    with pytest.raises(PeerFailed, match="SIGTERM") as raised:
        pair.claim("c", 0, grace_s=60)
    assert raised.value.verdict["kind"] == state


def test_consumers_that_stopped_are_waited_for_and_nothing_is_freed(pair, clock):
    publish(pair, 0)
    pair.demand("c", 1)
    pair.claim("c", 0)
    pair.end("c", "stopped", "SIGTERM")
    assert pair.next_demand("p", grace_s=60) == 1  # what was demanded is wanted still
    publish(pair, 1)
    assert pair.next_demand("p", grace_s=60) is None
    clock.now += 61
    with pytest.raises(PeerFailed, match="stopped as asked: SIGTERM"):
        pair.next_demand("p", grace_s=60)
    assert pair.take_drops() == []
    attach(pair, "c2")
    assert [pair.claim("c2").rollout_id for _ in range(2)] == [0, 1]
