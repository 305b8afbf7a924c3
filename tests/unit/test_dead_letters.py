"""Rollouts that are set aside: those that end one train job after the other, and those that cannot be published."""

import pytest

from slime.cross_job.errors import Poisoned, Refused
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.records_json import decode, encode
from slime.cross_job.ledger.snapshot import restore
from slime.cross_job.types import ClientInfo
from tests.support.ledger import attach, figures, publish, remembered


def trainer(ledger: Ledger, number: int, resume: int = 0) -> str:
    """A train job that goes on from a checkpoint which covers what is below `resume`."""
    name = attach(ledger, f"c{number}")
    ledger.resume(name, resume)
    return name


def die_in(ledger: Ledger, number: int, rollout_id: int, state: str = "failed", **how: bool) -> None:
    name = trainer(ledger, number)
    ledger.demand(name, rollout_id)
    assert ledger.claim(name, rollout_id) is not None
    ledger.training(name, rollout_id)
    ledger.end(name, state, "CUDA error: an illegal memory access", **how)


def letter(ledger: Ledger, rollout_id: int) -> dict:
    return figures(ledger, "dead_letters")[0][str(rollout_id)]


def test_a_rollout_that_ends_three_train_jobs_is_named_and_handed_to_no_fourth(ledger):
    attach(ledger, "p")
    publish(ledger, 0)
    for number in range(3):
        assert figures(ledger, "dead_letters") == [{}]
        die_in(ledger, number, 0)
    assert "3 train jobs in a row ended while they trained on it" in letter(ledger, 0)["reason"]
    fourth = attach(ledger, "c9")
    for ask in (ledger.demand, ledger.claim):
        with pytest.raises(Poisoned, match=r"rollout 0 of job exp is set aside: .*illegal memory.*requeue 0.*drop 0"):
            ask(fourth, 0)
    with pytest.raises(Poisoned, match="rollout 0 of job exp is set aside"):  # slime's job, before it takes a GPU
        ledger.membership.attach(ClientInfo("c10", "exp", "consumer", group="train", ray_job_id="r", of_slime=True))
    assert ledger.get("exp", 0).version == 1, "it can be looked at"
    assert figures(ledger, "standing")[0][0]["level"] == "error"
    assert ledger.requeue("exp", 0) == "dead letters"
    ledger.demand(fourth, 0)
    assert ledger.claim(fourth, 0) is not None


@pytest.mark.parametrize("state", ["failed", "dead"])
def test_only_what_ended_by_itself_counts(ledger, state):
    attach(ledger, "p")
    publish(ledger, 0)
    for number in range(6):  # its node died, or another took its place
        die_in(ledger, number, 0, "dead")
    assert figures(ledger, "dead_letters") == [{}]
    for number in range(6, 9):
        die_in(ledger, number, 0, state, crashed=state == "dead")
    assert letter(ledger, 0)["version"] == 1


def test_who_passes_it_clears_it_and_who_was_not_training_is_not_blamed(ledger):
    attach(ledger, "p")
    publish(ledger, 0)
    publish(ledger, 1)
    die_in(ledger, 0, 0)
    die_in(ledger, 1, 0)
    passes = trainer(ledger, 2)
    ledger.claim(passes, 0)
    ledger.training(passes, 0)
    ledger.claim(passes, 1)
    ledger.training(passes, 1)
    ledger.training(passes, None)
    ledger.end(passes, "failed", "the rollout job failed")
    die_in(ledger, 3, 0)
    die_in(ledger, 4, 0)
    assert figures(ledger, "dead_letters") == [{}]


def test_with_skip_it_is_replaced_by_one_of_new_prompts(ledger):
    attach(ledger, "p", on_poison="skip")
    publish(ledger, 0, source={"at": 8})
    for number in range(3):
        die_in(ledger, number, 0)
    assert letter(ledger, 0)["replaced"]
    fourth = trainer(ledger, 9)
    ledger.demand(fourth, 0)
    assert ledger.claim(fourth, 0) is None
    assert ledger.next_demand("p") == 0
    assert ledger.source_before("p", 0) == (1, ledger.jobs["exp"].sources[0]), "behind the prompts of before"
    publish(ledger, 0, token="anew")
    assert ledger.claim(fourth, 0).payload.token == "anew"
    assert ledger.garbage.take_drops() == [("v1/a", "t0")]


def test_where_train_jobs_end_in_the_replacement_too_skipping_ends(ledger):
    """As where a step does not fit into the GPU: each skip would cost a rollout and three train jobs, for ever."""
    attach(ledger, "p", on_poison="skip")
    for generation in range(2):
        publish(ledger, 0, token=f"t{generation}")
        for number in range(3):
            die_in(ledger, 3 * generation + number, 0)
    assert letter(ledger, 0)["stuck"]
    assert "So did those that trained on the rollout which it replaces" in letter(ledger, 0)["reason"]
    passes = trainer(ledger, 9)
    with pytest.raises(Poisoned, match="requeue 0"):
        ledger.demand(passes, 0)
    ledger.requeue("exp", 0)
    ledger.demand(passes, 0)
    assert ledger.claim(passes, 0).payload.token == "t1"


def test_what_replaces_a_rollout_that_could_not_be_published_is_skipped_as_any_other(ledger):
    """Nobody has trained on that one: three ends say nothing of a cause elsewhere yet."""
    attach(ledger, "p", on_poison="skip")
    asks = trainer(ledger, 9)
    ledger.demand(asks, 0)
    assert ledger.next_demand("p") == 0
    assert ledger.set_aside("p", 0, "an object") == "skip"
    publish(ledger, 0)
    ledger.end(asks, "stopped")
    for number in range(3):
        die_in(ledger, number, 0)
    assert letter(ledger, 0)["replaced"]
    assert not letter(ledger, 0)["stuck"]
    assert "So did those" not in letter(ledger, 0)["reason"]


def test_jobs_that_were_stopped_may_be_started_again_to_skip(ledger):
    attach(ledger, "p")
    publish(ledger, 0)
    for number in range(3):
        die_in(ledger, number, 0)
    ledger.end("p", "stopped")
    slime = {"role": "producer", "ray_job_id": "r2", "of_slime": True}
    with pytest.raises(Poisoned):
        ledger.membership.attach(ClientInfo("p2", "exp", **slime))
    ledger.membership.attach(ClientInfo("p2", "exp", **slime), on_poison="skip")
    fourth = trainer(ledger, 9)
    ledger.demand(fourth, 0)
    assert ledger.next_demand("p2") == 0


def test_what_cannot_be_published_for_what_it_holds_is_not_generated_again_and_again(ledger):
    attach(ledger, "p")
    train = trainer(ledger, 0)
    ledger.demand(train, 0)
    assert ledger.next_demand("p") == 0
    assert ledger.set_aside("p", 0, "metadata['config'] is a Config") == "stop"
    for ask in (lambda: ledger.next_demand("p"), lambda: ledger.claim(train, 0)):
        with pytest.raises(Refused, match=r"it cannot be published: metadata\['config'\] is a Config.*requeue 0"):
            ask()
    ledger.requeue("exp", 0)
    assert ledger.next_demand("p") == 0


def test_a_rollout_is_set_aside_once_though_the_answer_was_lost(ledger):
    attach(ledger, "p", on_poison="skip")
    ledger.demand(trainer(ledger, 0), 0)
    for attempt in (1, 2):
        assert ledger.next_demand("p") == 0, "a producer that skips is asked again"
        assert [ledger.set_aside("p", 0, "an object") for _ in range(3)] == ["skip"] * 3
        assert ledger.jobs["exp"].refused == attempt
        assert letter(ledger, 0) | {"at": 0} == {
            **{"reason": "it cannot be published: an object", "at": 0, "replaced": True, "stuck": False},
            **{"version": 0, "weight_version": None, "nbytes": 0},
        }
    assert ledger.next_demand("p") == 0
    assert letter(ledger, 0)["replaced"], "also while it is generated again"
    assert [ledger.set_aside("p", 0, "an object") for _ in range(2)] == ["stop"] * 2


def test_where_no_rollout_can_be_published_skipping_ends(ledger):
    """As where every sample has an object in its metadata: each try costs a generation."""
    attach(ledger, "p", on_poison="skip")
    train = trainer(ledger, 0)
    told = []
    for rollout_id in (0, 0, 1, 1, 1):
        if rollout_id == 1 and not figures(ledger, "published")[0]:
            publish(ledger, 0)
        ledger.demand(train, rollout_id)
        assert ledger.next_demand("p") == rollout_id
        told.append(ledger.set_aside("p", rollout_id, "an object"))
    assert told == ["skip", "skip", "skip", "skip", "stop"]
    with pytest.raises(Poisoned, match="requeue 1"):
        ledger.next_demand("p")
    with pytest.raises(Poisoned, match="requeue 1"):
        ledger.membership.attach(ClientInfo("p2", "exp", "producer", ray_job_id="r2", of_slime=True))
    ledger.requeue("exp", 1)
    assert ledger.next_demand("p") == 1


def test_dead_letters_outlive_the_broker(ledger):
    attach(ledger, "p")
    publish(ledger, 0)
    for number in range(3):
        die_in(ledger, number, 0)
    again = Ledger()
    kept = remembered(ledger)
    assert decode(encode(kept[0][0].job)).dead_letters == ledger.jobs["exp"].dead_letters
    restore(again, kept, [ledger.get("exp", 0)])
    assert figures(again, "dead_letters") == figures(ledger, "dead_letters")


def test_a_recorder_is_not_held_up(ledger):
    attach(ledger, "p")
    attach(ledger, "cr", group="recording:kept")
    publish(ledger, 0)
    for number in range(3):
        die_in(ledger, number, 0)
    assert ledger.claim("cr").rollout_id == 0


def test_who_ends_in_an_update_or_an_evaluation_after_it_blames_no_rollout(ledger):
    attach(ledger, "p")
    publish(ledger, 0)
    for number in range(3):
        name = trainer(ledger, number)
        ledger.claim(name, 0)
        ledger.training(name, 0)
        ledger.begin_update(name)
        ledger.end(name, "failed", "boom")
    assert [ledger.jobs["exp"].crashes, *figures(ledger, "dead_letters")] == [{}, {}]
