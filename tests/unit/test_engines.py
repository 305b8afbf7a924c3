"""The gate: no weights land in the middle of a generation, and none are waited for that cannot come."""

import pytest

from slime.cross_job.errors import BadInput, NotOwner, PeerFailed, WrongWeights
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import ClientInfo, Payload


def attach(ledger: Ledger, name: str, role: str, ray_job: str, **stated: int) -> str:
    group = "train" if role == "consumer" else ""
    ledger.membership.attach(ClientInfo(name, "exp", role, group, ray_job_id=ray_job), **stated)
    ledger.announce(name, [f"facts of {name}"])
    return name


def jobs(ledger: Ledger, max_ahead: int = 0) -> tuple[str, str]:
    return attach(ledger, "r1", "producer", "01", max_ahead=max_ahead), attach(ledger, "t1", "consumer", "02")


def update(ledger: Ledger, trainer: str, version: int, until: int | None = None) -> None:
    epoch = ledger.begin_update(trainer, until)
    assert epoch is not None
    ledger.end_update(trainer, version, epoch)


def begun(ledger: Ledger, max_ahead: int = 0) -> tuple[str, str]:
    """Both jobs, where the engines have weights 0, and rollout 0 is demanded."""
    rollout, train = jobs(ledger, max_ahead)
    update(ledger, train, 0)
    ledger.demand(train, 0)
    return rollout, train


def wanted(ledger: Ledger, rollout_job: str, until: int | None = None) -> int | None:
    return ledger.next_demand(rollout_job, until=until, gated=True)


def publish(ledger: Ledger, rollout_job: str, rollout_id: int) -> int | None:
    payload = Payload(f"{rollout_job}-{rollout_id}", "vault", 1, meta={"of": rollout_id})
    return ledger.publish(rollout_job, rollout_id, payload)[1].payload.weight_version


def test_nothing_is_generated_before_the_engines_have_weights(ledger):
    rollout, train = jobs(ledger)
    ledger.demand(train, 0)
    assert wanted(ledger, rollout) is None
    update(ledger, train, 0)
    assert wanted(ledger, rollout) == 0
    assert publish(ledger, rollout, 0) == 0


def test_weights_wait_for_the_end_of_a_generation_and_it_for_them(ledger):
    rollout, train = begun(ledger)
    assert wanted(ledger, rollout) == 0
    assert ledger.begin_update(train) is None
    publish(ledger, rollout, 0)
    epoch = ledger.begin_update(train)
    ledger.demand(train, 1)
    assert wanted(ledger, rollout) is None, "weights are under way"
    ledger.end_update(train, 1, epoch)
    assert wanted(ledger, rollout) == 1
    assert publish(ledger, rollout, 1) == 1


def test_one_ahead_is_generated_with_the_weights_of_before_however_fast_the_trainer_is(ledger):
    rollout, train = begun(ledger, max_ahead=1)
    assert wanted(ledger, rollout) == 0
    publish(ledger, rollout, 0)
    assert ledger.begin_update(train, until=3) is None, "rollout 1 is to see the same weights, and has not begun"
    assert wanted(ledger, rollout, until=3) == 1
    assert ledger.begin_update(train, until=3) is None
    assert publish(ledger, rollout, 1) == 0
    update(ledger, train, 1, until=3)
    assert wanted(ledger, rollout, until=3) is None
    ledger.demand(train, 1)
    assert wanted(ledger, rollout, until=3) == 2
    assert publish(ledger, rollout, 2) == 1


def test_behind_the_last_rollout_nothing_is_waited_for(ledger):
    rollout, train = begun(ledger, max_ahead=1)
    publish(ledger, rollout, 0)
    update(ledger, train, 1, until=1)
    assert wanted(ledger, rollout, until=1) is None, "the engines stay until the train job ends"


def test_a_train_job_that_is_started_again_with_more_rollouts_gets_them(ledger):
    """The rollout job was started with 2, and waits for a demand since."""
    rollout, train = jobs(ledger, max_ahead=1)
    update(ledger, train, 0, until=2)
    for rollout_id in (0, 1):
        ledger.demand(train, rollout_id)
        assert wanted(ledger, rollout, until=2) == rollout_id
        publish(ledger, rollout, rollout_id)
    assert wanted(ledger, rollout, until=2) is None
    ledger.end(train, "failed", "killed")
    again = attach(ledger, "t2", "consumer", "04")
    ledger.resume(again, 2)
    update(ledger, again, 2, until=4)
    ledger.demand(again, 2)
    assert wanted(ledger, rollout, until=2) == 2
    publish(ledger, rollout, 2)
    assert wanted(ledger, rollout, until=2) == 3, "ahead of the last demanded, as far as the new train job goes"
    publish(ledger, rollout, 3)
    assert wanted(ledger, rollout, until=2) is None


def test_further_ahead_only_what_an_update_waits_for_is_begun(ledger):
    rollout, train = begun(ledger, max_ahead=5)
    for rollout_id in (0, 1):
        assert wanted(ledger, rollout) == rollout_id
        publish(ledger, rollout, rollout_id)
    assert wanted(ledger, rollout) == 2
    assert ledger.begin_update(train) is None
    publish(ledger, rollout, 2)
    assert ledger.begin_update(train) is not None
    assert wanted(ledger, rollout) is None


def test_new_engines_get_weights_before_anything_else(ledger):
    rollout, train = begun(ledger)
    assert wanted(ledger, rollout) == 0
    assert ledger.unloaded(train, since=1) is None
    ledger.end(rollout, "dead", "killed")
    again = attach(ledger, "r2", "producer", "03")
    assert ledger.unloaded(train, since=1) == 2
    assert wanted(ledger, again) is None
    assert ledger.loaded(train) is None
    update(ledger, train, 0)  # although rollout 0 is demanded and was never published
    assert ledger.loaded(train) == 0
    assert ledger.unloaded(train, since=1) is None
    assert wanted(ledger, again) == 0


def test_an_update_that_its_rollout_job_did_not_survive_does_not_count(ledger):
    rollout, train = jobs(ledger)
    epoch = ledger.begin_update(train)
    ledger.end(rollout, "dead", "killed")
    attach(ledger, "r2", "producer", "03")
    assert wanted(ledger, "r2") is None
    with pytest.raises(NotOwner, match="gone: update the weights again"):
        ledger.end_update(train, 0, epoch)
    update(ledger, train, 0)
    ledger.demand(train, 0)
    assert wanted(ledger, "r2") == 0


def test_engines_that_a_train_job_left_in_the_middle_of_an_update_wait_for_the_next_one(ledger):
    rollout, train = begun(ledger)
    ledger.begin_update(train)
    publish(ledger, rollout, 0)
    assert ledger.begin_update(train) == 1
    ledger.end(train, "dead", "killed")
    again = attach(ledger, "t2", "consumer", "03")
    ledger.demand(again, 1)
    assert wanted(ledger, rollout) is None
    assert ledger.loaded(again) is None
    update(ledger, again, 0)
    assert wanted(ledger, rollout) == 1


def test_a_retried_end_is_the_same_end(ledger):
    _, train = jobs(ledger)
    epoch = ledger.begin_update(train)
    assert ledger.begin_update(train) == epoch
    ledger.end_update(train, 3, epoch)
    ledger.end_update(train, 3, epoch)
    with pytest.raises(NotOwner):
        ledger.end_update(train, 4, epoch)


def test_a_broken_update_leaves_the_engines_without_known_weights(ledger):
    rollout, train = jobs(ledger)
    ledger.begin_update(train)
    ledger.break_update(train)
    ledger.demand(train, 0)
    assert wanted(ledger, rollout) is None
    assert ledger.unloaded(train, since=0) == 1
    update(ledger, train, 0)
    assert wanted(ledger, rollout) == 0


def test_waiting_for_a_dead_rollout_job_ends_with_the_grace(ledger, clock):
    rollout, train = jobs(ledger)
    ledger.end(rollout, "dead", "killed")
    for ask in (ledger.begin_update, ledger.loaded, ledger.facts):
        assert ask(train, grace_s=60) is None
    clock.now += 61
    for ask in (ledger.begin_update, ledger.loaded, ledger.facts):
        with pytest.raises(PeerFailed, match="killed"):
            ask(train, grace_s=60)


def test_each_side_hears_what_the_newest_of_the_other_announced(ledger, clock):
    rollout, train = jobs(ledger)
    assert ledger.facts(train) == (1, ["facts of r1"])
    assert ledger.facts(rollout) == (1, ["facts of t1"])
    ledger.end(train, "dead", "killed")
    clock.now += 1
    attach(ledger, "t2", "consumer", "03")
    assert ledger.facts(rollout) == (2, ["facts of t2"])


def test_a_rollout_that_is_there_already_ends_its_generation(ledger):
    """Generated twice, because a rollout job could not know; the vault finds it equal and records no new version."""
    rollout, train = begun(ledger)
    assert wanted(ledger, rollout) == 0
    payload = Payload("t", "vault", 1, num_samples=1)
    ledger.publish(rollout, 0, payload)
    ledger.jobs["exp"].gate.generating = 0
    again = ledger.jobs["exp"].rollouts[0][0].payload
    assert (
        ledger.publish(rollout, 0, Payload("u", "vault", 1, num_samples=1, weight_version=0), compare=True)[0] is False
    )
    assert again.weight_version == 0
    assert ledger.begin_update(train) == 1


def test_jobs_that_hand_weights_over_as_a_value_do_not_meet_the_gate(ledger):
    rollout, train = jobs(ledger)
    ledger.demand(train, 0)
    assert ledger.next_demand(rollout) == 0
    assert publish(ledger, rollout, 0) is None


def stamped(ledger: Ledger, rollout_job: str, rollout_id: int, said: list[str] | None) -> int | None:
    meta = {} if said is None else {"weights_said": said}
    payload = Payload(f"{rollout_job}-{rollout_id}-{said}", "vault", 1, meta=meta)
    return ledger.publish(rollout_job, rollout_id, payload)[1].payload.weight_version


def test_a_rollout_that_other_weights_generated_is_not_taken(ledger):
    """Also where all was well when the gate opened: an engine was restarted, or another job uses it."""
    rollout, train = jobs(ledger)
    ledger.end_update(train, 3, ledger.begin_update(train), "exp/3/a")
    ledger.demand(train, 0)
    assert wanted(ledger, rollout) == 0
    for said in (["exp/new/b"], ["exp/3/a", "exp2/7/c"]):
        with pytest.raises(WrongWeights, match=rf"rollout 0 .* engines said weights {said[-1]} .* weights exp/3/a"):
            stamped(ledger, rollout, 0, said)
    assert ledger.catalog("exp") == []
    assert stamped(ledger, rollout, 0, ["exp/3/a"]) == 3
    assert stamped(ledger, rollout, 0, ["exp/3/a"]) == 3, "a retry, whose answer was lost"


def test_what_engines_say_counts_for_the_engines_that_were_updated_only(ledger):
    rollout, train = jobs(ledger)
    ledger.end_update(train, 3, ledger.begin_update(train), "exp/3/a")
    ledger.end(rollout, "dead", "killed")
    again = attach(ledger, "r2", "producer", "03")
    ledger.demand(train, 0)
    ledger.end_update(train, 3, ledger.begin_update(train))  # these report nothing
    assert wanted(ledger, again) == 0
    assert stamped(ledger, again, 0, ["default"]) == 3
    ledger.end_update(train, 4, ledger.begin_update(train), "exp/4/b")
    ledger.demand(train, 1)
    assert wanted(ledger, again) == 1
    assert stamped(ledger, again, 1, None) == 4, "a producer without engines says nothing"


@pytest.mark.parametrize("stamp", [None, 3, "x" * 401])
def test_a_stamp_that_is_none_is_refused_before_anything_changes(ledger, stamp):
    _, train = jobs(ledger)
    epoch = ledger.begin_update(train)
    with pytest.raises(BadInput, match="no stamp of weights"):
        ledger.end_update(train, 3, epoch, stamp)
    assert ledger.loaded(train) is None
