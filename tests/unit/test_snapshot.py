"""A ledger that is made again from what vaults remember knows everything that it ever said."""

import pickle
import time
from typing import Any

import pytest

from slime.cross_job.errors import Fenced, Forgotten, PayloadLost, PeerFailed, RolloutNotFound, ValueLost
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.snapshot import Snapshot, Tables, restore, snapshot
from slime.cross_job.types import Located, LocatedValue
from tests.support.ledger import Clock, attach, ends_at, figures, publish, remembered, train, weights
from tests.support.patience import patient

Remembered = tuple[Snapshot, Tables]


def held(ledger: Ledger) -> list[Located | LocatedValue]:
    """The records of all that can be read."""
    values = [value for job in ledger.jobs.values() for value in job.values.values()]
    return [v for located in ledger.catalog() for v in ledger.versions(located.job_id, located.rollout_id)] + values


def made_again(clock: Clock, kept: list[Remembered], records: list[Any], missing: dict[str, list[int]] | None = None):
    ledger = Ledger(clock, wall=clock)
    assert restore(ledger, kept, pickle.loads(pickle.dumps(records))) == (missing or {})
    return ledger


def restarted(ledger: Ledger, clock: Clock) -> Ledger:
    return made_again(clock, remembered(ledger), held(ledger))


def without_clocks(status: dict[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in status["exp"].items() if name not in ("producer", "consumers")}


@pytest.fixture
def busy(ledger: Ledger) -> Ledger:
    """Rollouts in every state: 0 freed, 1 retained, 2 leased, 3 lost, 4 and 5 published, 6 demanded."""
    attach(ledger, "p", retain=1, max_ahead=3, max_staleness=4, terms={"seed": 1})
    attach(ledger, "c", terms={"seed": 1})
    attach(ledger, "ca", group="archive")
    ledger.end("ca", "finished")
    ledger.end(attach(ledger, "c0", group="eval"), "failed", "boom")
    ledger.end(attach(ledger, "c9", group="eval"), "finished")
    for rollout_id in range(6):
        publish(ledger, rollout_id, source=f"after {rollout_id}")
    publish(ledger, 4, "other content", source="after 4")
    train(ledger, 0, 1)
    ledger.claim("c", 2)
    ledger.rollouts.payload_lost("exp", "t3")
    weights(ledger, 1)
    ledger.demand("c", 6)
    assert ledger.next_demand("p") == 6
    ledger.garbage.take_drops()
    return ledger


def test_all_that_was_counted_is_counted_on(busy, clock):
    again = restarted(busy, clock)
    assert without_clocks(again.status()) == without_clocks(busy.status())
    assert again.catalog() == busy.catalog()
    assert again.garbage.take_drops() == []


def test_clients_go_on_as_who_they_were(busy, clock):
    again = restarted(busy, clock)
    again.heartbeat("p", "at work")
    again.ack("c", 2)
    with pytest.raises(Fenced, match="boom"):
        again.heartbeat("c0", "I was only asleep")
    assert again.clients["c"].terms == {"seed": 1}
    again.end("p", "dead", "killed")
    attach(again, "p2")
    assert again.jobs["exp"].producer.epoch == 2


def test_leases_acks_and_demands_hold(busy, clock):
    again = restarted(busy, clock)
    attach(again, "c2")
    assert again.claim("c2", 2) is None  # it is the other one's
    assert again.claim("c2").rollout_id == 4
    assert [v.version for v in again.versions("exp", 4)] == [1, 2]
    for acked in (0, 1):
        with pytest.raises(RolloutNotFound, match="acked"):
            again.claim("c2", acked)
    assert again.next_demand("p") == 6
    assert figures(again, "lost", "last_demanded") == [[3], 6]


def test_what_was_answered_is_answered_again(busy, clock):
    claimed = busy.claim("c", token="asked once")
    published = publish(busy, 6, "t6")
    again = restarted(busy, clock)
    assert again.claim("c", token="asked once") == claimed
    assert publish(again, 6, "t6") == published
    weights(again, 1)
    assert figures(again, "published", "claimed") == figures(busy, "published", "claimed")


def test_each_generation_begins_where_it_began_before(busy, clock):
    before = [ends_at(busy, rollout_id) for rollout_id in (3, 4, 5, 6)]
    assert before == [(3, "after 2"), (4, "after 3"), (5, "after 4"), (6, "after 5")]
    again = restarted(busy, clock)
    assert [ends_at(again, rollout_id) for rollout_id in (3, 4, 5, 6)] == before


def test_nobody_is_dead_because_the_broker_was(busy, clock):
    clock.now += 1000
    again = restarted(busy, clock)
    assert again.membership.tick() == []
    for _ in range(31):
        clock.now += 1
        gone = again.membership.tick()
    assert [client.info.client_id for client in gone] == ["p", "c"]


def test_the_grace_of_a_peer_that_failed_begins_anew(pair, clock):
    pair.end("p", "failed", "boom")
    clock.now += 1000
    again = restarted(pair, clock)
    assert again.claim("c", 0, grace_s=60) is None
    clock.now += 61
    with pytest.raises(PeerFailed, match="boom"):
        again.claim("c", 0, grace_s=60)


def test_a_weight_update_that_was_under_way_still_is(pair, clock):
    for name in ("p", "c"):
        pair.announce(name, "facts")
    epoch = pair.begin_update("c")
    pair.demand("c", 0)
    again = restarted(pair, clock)
    assert again.next_demand("p", gated=True) is None
    again.end_update("c", 7, epoch)
    assert again.next_demand("p", gated=True) == 0
    assert again.facts("c") == (1, "facts")


# ---------------------------------------------------------------------- what no vault holds any more


def test_what_no_vault_holds_any_more_is_lost_and_named(busy, clock):
    records = [r for r in held(busy) if getattr(r, "rollout_id", -1) not in (1, 2, 5)]
    again = made_again(clock, remembered(busy), records, missing={"exp": [1, 2, 5]})
    assert figures(again, "lost", "losses", "freed") == [[2, 3, 5], 3, 1]  # 1 had taken effect
    again.ack("c", 2)  # it was read
    again.demand("c", 5)
    assert [again.next_demand("p"), ends_at(again, 5)] == [5, (5, "after 4")]


def test_where_a_source_stood_is_known_although_the_rollouts_are_lost(busy, clock):
    again = made_again(clock, remembered(busy), [], missing={"exp": [1, 2, 4, 5]})
    assert ends_at(again, 6) == (6, "after 5")


def test_that_nobody_knows_where_a_source_stood_is_not_taken_for_its_beginning(busy, clock):
    kept = [(found, {}) for found, _ in remembered(busy)]
    again = made_again(clock, kept, [], missing={"exp": [1, 2, 4, 5]})
    with pytest.raises(PayloadLost, match="where the source of prompts stood before rollout 6 of job exp is lost"):
        again.source_before("p", 6)


# ---------------------------------------------------------------------- which of several


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_newest_snapshot_of_the_newest_broker_counts(ledger, clock, order):
    attach(ledger, "p")
    kept = remembered(ledger, broker=1, serial=98)
    attach(ledger, "c")
    kept += remembered(ledger, broker=1, serial=99)
    ledger.demand("c", 3)
    kept += remembered(ledger, broker=2, serial=1)
    again = made_again(clock, [kept[n] for n in order], [])
    assert again.next_demand("p") == 3


@pytest.mark.parametrize("oldest_first", [True, False])
def test_clients_that_came_after_an_older_snapshot_are_known(pair, clock, oldest_first):
    kept = remembered(pair, serial=1)
    pair.end("c", "dead", "killed")
    attach(pair, "c2")
    kept += remembered(pair, serial=2)
    again = made_again(clock, kept if oldest_first else kept[::-1], [])
    again.heartbeat("c2", "here")
    with pytest.raises(Fenced, match="killed"):
        again.heartbeat("c", "here")


def test_jobs_have_snapshots_of_their_own(clock):
    ledger = Ledger(clock, wall=clock)
    kept = []
    for serial, job_id in enumerate(("first", "second")):
        attach(ledger, f"p-{job_id}", job=job_id)
        publish(ledger, serial, token=job_id, producer=f"p-{job_id}")
        kept += [one for one in remembered(ledger, serial=serial) if one[0].job.job_id == job_id]
    again = made_again(clock, kept, held(ledger))
    assert [(located.job_id, located.rollout_id) for located in again.catalog()] == [("first", 0), ("second", 1)]
    assert again.clients["p-first"].live


# ---------------------------------------------------------------------- records alone


def test_without_any_snapshot_what_vaults_hold_is_there_and_clients_begin_anew(busy, clock):
    again = made_again(clock, [], held(busy))
    with pytest.raises(Forgotten, match="start this job again"):
        again.heartbeat("c", "here")
    attach(again, "c-new")
    attach(again, "p-new")
    assert [again.claim("c-new").rollout_id for _ in range(4)] == [1, 2, 4, 5]
    assert again.claim("c-new") is None
    assert again.get_value("exp", "weights").version == 1


@pytest.mark.parametrize("first", ["v1", "v2"])
def test_without_any_snapshot_the_next_generation_begins_where_the_newest_ended(pair, clock, first):
    for rollout_id in range(4):
        clock.now += 1
        publish(pair, rollout_id, vault=f"v{1 + rollout_id % 2}/a", source=f"after {rollout_id}")
    records = sorted(held(pair), key=lambda record: not record.payload.vault.startswith(first))
    again = made_again(clock, [], records)
    attach(again, "p2")
    assert ends_at(again, 4, "p2") == (4, "after 3")


def test_a_record_that_no_snapshot_knows_yet_is_there(pair, clock):
    kept = remembered(pair)
    publish(pair, 0, source="after 0")
    again = made_again(clock, kept, held(pair))
    assert again.claim("c").payload.token == "t0"
    assert ends_at(again, 1) == (1, "after 0")


def test_what_was_freed_and_is_still_held_is_freed_again(pair, clock):
    publish(pair, 0)
    records = held(pair)
    train(pair, 0)
    again = made_again(clock, remembered(pair), records)
    assert again.garbage.take_drops() == [("v1/a", "t0")]
    assert again.catalog() == []


def test_of_several_values_of_a_key_the_one_that_came_last_counts(pair, clock):
    weights(pair, 9)
    records = held(pair)
    pair.end("c", "dead", "killed")
    attach(pair, "c2")
    weights(pair, 2, author="c2")  # training went back
    again = made_again(clock, remembered(pair), held(pair) + records)
    assert again.get_value("exp", "weights").version == 2
    assert again.garbage.take_drops() == [("v1/a", "w9-c")]
    weights(again, 3, author="c2")


def test_a_complete_job_stays_complete_and_its_name_begins_anew(pair, clock):
    publish(pair, 0)
    records = held(pair)
    for name in ("p", "c"):
        pair.end(name, "finished")
    again = made_again(clock, remembered(pair), records)
    assert figures(again, "complete", "retained", "freed") == [True, 0, 1]
    assert again.garbage.take_drops() == [("v1/a", "t0")]
    attach(again, "p2")
    assert publish(again, 0, "new", producer="p2").version == 1


# ---------------------------------------------------------------------- how much


def test_a_thousand_rollouts_and_fifty_consumers_are_there_at_once(pair, clock):
    for number in range(50):
        pair.end(attach(pair, f"c{number}", group=f"g{number % 5}"), "finished")
    for rollout_id in range(1000):
        publish(pair, rollout_id, meta={"step": rollout_id}, columns=("tokens",) * 10, source={"at": rollout_id})
    train(pair, *range(0, 100, 2))
    for rollout_id in range(100, 200):
        pair.claim("c", rollout_id)
    kept, records = remembered(pair), pickle.dumps(held(pair))
    began = time.perf_counter()
    again = Ledger(clock, wall=clock)
    restore(again, kept, pickle.loads(records))
    took_s = time.perf_counter() - began
    assert took_s < patient(1.0)
    assert without_clocks(again.status()) == without_clocks(pair.status())
    assert again.claim("c").rollout_id == 1


def test_a_snapshot_does_not_grow_with_what_rollouts_and_sources_say(pair):
    sizes = []
    for rollout_id in range(1000):
        publish(pair, rollout_id, meta={"text": "x" * 500}, source={"order": [*range(200)]})
        if rollout_id in (99, 999):
            sizes.append(len(pickle.dumps(snapshot(pair, "exp", 1, 1))))
    assert sizes[1] - sizes[0] < 100  # bytes, for 900 rollouts


def test_weights_that_no_vault_holds_are_asked_for_again(pair, clock):
    weights(pair, 3)
    again = made_again(clock, remembered(pair), [])
    with pytest.raises(ValueLost, match="weights version 3"):
        again.claim("c", 0)
    assert restarted(pair, clock).claim("c", 0) is None
