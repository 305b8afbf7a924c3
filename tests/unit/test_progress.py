"""What people see of a job: how far rollouts came, who waited, what happened; and what an operator may do to it."""

import pytest

from slime.cross_job.errors import BadInput, GroupNotFound, JobNotFound, Refused, RolloutNotFound
from slime.cross_job.ledger import Ledger, history
from slime.cross_job.ledger.records_json import decode, encode
from slime.cross_job.ledger.state import ANSWERS, Job
from slime.cross_job.ledger.status import bottleneck, looked
from slime.cross_job.ledger.verdicts import FEWEST
from tests.support.ledger import Clock, attach, attach_pair, publish, publish_each, restarted, train, weights


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    ledger = Ledger(clock, wall=clock)
    attach_pair(ledger, max_ahead=1)
    return ledger


def state(ledger: Ledger, rollout_id: int) -> str:
    return ledger.jobs["exp"].progress[rollout_id].state


def kinds(ledger: Ledger) -> list[str]:
    return [event.kind for event in ledger.jobs["exp"].events.values()]


def test_a_rollout_goes_its_way(ledger, clock):
    ledger.demand("c", 0)
    assert state(ledger, 0) == "demanded"
    clock.now += 1
    ledger.next_demand("p")
    assert state(ledger, 0) == "generating"
    clock.now += 5
    publish(ledger, 0, made_at=clock.now - 1, meta={"reward": 0.5}, weight_version=0, num_samples=4)
    assert state(ledger, 0) == "published"
    weights(ledger, 2)
    clock.now += 2
    ledger.claim("c", 0)
    assert state(ledger, 0) == "claimed"
    clock.now += 3
    ledger.ack("c", 0)
    known = ledger.jobs["exp"].progress[0]
    assert (known.demanded, known.begun, known.made, known.published) == (1000, 1001, 1005, 1006)
    assert (known.claimed, known.acked, known.state) == (1008, 1011, "freed")
    assert (known.reward, known.weight_version, known.staleness, known.nbytes, known.num_samples) == (0.5, 0, 2, 10, 4)
    assert ledger.jobs["exp"].nbytes == {"published": 10, "claimed": 10, "acked": 10}


def test_what_is_generated_ahead_was_begun_before_it_was_demanded(ledger, clock):
    ledger.demand("c", 0)
    ledger.next_demand("p")
    publish(ledger, 0)
    assert ledger.next_demand("p") == 1
    clock.now += 4
    ledger.demand("c", 1)
    assert (state(ledger, 1), ledger.jobs["exp"].progress[1].demanded) == ("generating", 1004)


def test_a_lease_that_ends_puts_it_back(ledger):
    publish(ledger, 0)
    ledger.claim("c", 0)
    ledger.end("c", "dead", "killed")
    assert state(ledger, 0) == "published"
    attach(ledger, "c2")
    ledger.claim("c2", 0)
    assert ledger.jobs["exp"].progress[0].claims == 2


def test_what_is_lost_says_so_and_is_published_again(ledger):
    publish(ledger, 0, "t0")
    ledger.rollouts.payload_lost("exp", "t0")
    assert (state(ledger, 0), kinds(ledger)[-1]) == ("lost", "lost")
    ledger.claim("c", 0)
    ledger.next_demand("p")
    assert state(ledger, 0) == "generating"
    publish(ledger, 0, "t0b")
    known = ledger.jobs["exp"].progress[0]
    assert (known.state, known.losses, known.version) == ("published", 1, 2)


def test_going_back_shows_what_is_handed_out_again(ledger):
    ledger.jobs["exp"].retain = 5
    publish_each(ledger, *range(3))
    train(ledger, 0, 1)
    ledger.demand("c", 5)
    ledger.resume("c", 1)
    assert [state(ledger, r) for r in range(3)] == ["acked", "published", "published"]
    assert 5 not in ledger.jobs["exp"].progress
    assert kinds(ledger)[-1] == "rewound"


def test_a_producer_that_ends_generates_nothing(ledger):
    ledger.demand("c", 0)
    ledger.next_demand("p")
    ledger.end("p", "failed", "boom")
    assert state(ledger, 0) == "demanded"
    assert kinds(ledger) == ["attached", "attached", "failed"]


def test_other_groups_change_nothing_of_it(ledger):
    attach(ledger, "ca", group="archive")
    ledger.demand("c", 0)
    publish(ledger, 0)
    ledger.claim("ca", 0)
    assert state(ledger, 0) == "published"
    ledger.claim("c", 0)
    ledger.ack("c", 0)
    assert state(ledger, 0) == "acked"
    ledger.ack("ca", 0)
    assert state(ledger, 0) == "freed"


def test_what_is_too_stale_is_dropped(ledger):
    job = ledger.jobs["exp"]
    job.max_staleness, job.on_stale = 0, "drop"
    publish(ledger, 0, weight_version=0)
    weights(ledger, 3)
    assert ledger.claim("c") is None
    assert (state(ledger, 0), kinds(ledger)[-1], job.nbytes["dropped"]) == ("dropped", "dropped", 10)


def test_waits_count_for_who_caused_them(ledger):
    job = ledger.jobs["exp"]
    ledger.views.note_wait("p", "next_demand", 2.0)
    job.control = "paused"
    ledger.views.note_wait("p", "next_demand", 1.0)
    job.control = "running"
    job.gate.producer_is(1)
    ledger.views.note_wait("p", "next_demand", 4.0)
    ledger.views.note_wait("c", "claim", 8.0)
    ledger.views.note_wait("c", "begin_update", 0.5)
    attach(ledger, "ca", group="archive")
    ledger.demand("c", 0)
    ledger.views.note_wait("ca", "claim", 100.0)
    ledger.views.note_wait("nobody", "claim", 100.0)
    ledger.views.note_wait("exp", "get_value", 100.0)
    assert job.waited == {
        **{"producer demand": 2.0, "producer pause": 1.0, "producer weights": 4.0},
        **{"consumer data": 8.0, "consumer weights": 0.5},
    }
    assert set(job.waited) < set(history.WAITS)
    ledger.next_demand("p")
    publish(ledger, 0)
    ledger.claim("c", 0)
    known = job.progress[0]
    assert (known.producer_waited_s, known.consumer_waited_s) == (7.0, 8.5)
    assert ledger.clients["c"].waited_s == 0.0


def test_a_full_job_waits_for_space(ledger):
    ledger.jobs["exp"].max_bytes = 15
    publish(ledger, 0)
    ledger.views.note_wait("p", "next_demand", 3.0)
    assert ledger.jobs["exp"].waited == {"producer space": 3.0}


@pytest.mark.parametrize(
    ("consumer_s", "producer_s", "elapsed_s", "expected"),
    [(5, 0, 10, 0.5), (0, 9, 10, -0.9), (3, 3, 10, 0.0), (50, 0, 10, 1.0), (0, 50, 10, -1.0), (1, 0, 0, None)],
)
def test_the_bottleneck_is_one_number(consumer_s, producer_s, elapsed_s, expected):
    assert bottleneck(consumer_s, producer_s, elapsed_s) == expected


def test_recent_figures_are_those_of_the_last_rollouts(ledger, clock):
    for rollout_id in range(40):
        ledger.demand("c", rollout_id)
        ledger.next_demand("p")
        clock.now += 2.0
        ledger.views.note_wait("c", "claim", 2.0)
        publish(ledger, rollout_id, num_samples=8, meta={"reward": rollout_id / 10})
        ledger.claim("c", rollout_id)
        clock.now += 2.0
        ledger.ack("c", rollout_id)
        ledger.heartbeat("p", "generating")
        ledger.heartbeat("c", "training")
    status = ledger.status("exp")["exp"]
    recent = status["recent"]
    assert recent["rollouts"] == 32
    assert recent["per_minute"] == pytest.approx(60 / 4)
    assert recent["samples_per_s"] == pytest.approx(8 / 4)
    assert recent["bottleneck"] == pytest.approx(1 / 2)
    assert recent["consumer_waited_share"] == pytest.approx(1 / 2)
    assert recent["reward"] == pytest.approx(sum(range(8, 40)) / 320)
    assert "generation is the bottleneck" in status["standing"][0]["text"]


def test_few_rollouts_give_no_verdict(ledger, clock):
    """Each side waits for all of the other's first rollout: nobody is the bottleneck for that."""
    for claimed in range(5):
        recent = ledger.status("exp")["exp"]["recent"]
        assert recent["rollouts"] == claimed
        assert (recent["per_minute"] is None) == (claimed < 2)
        shares = [recent[name] for name in ("bottleneck", "consumer_waited_share", "producer_waited_share")]
        assert (shares == [None] * 3) == (claimed < FEWEST), claimed
        balance = said(ledger)[-1][1]
        assert ("bottleneck" in balance or "Balanced" in balance) == (claimed >= FEWEST), balance
        ledger.views.note_wait("p", "next_demand", 30.0)
        ledger.demand("c", claimed)
        ledger.next_demand("p")
        clock.now += 30.0
        ledger.views.note_wait("c", "claim", 30.0)
        publish(ledger, claimed)
        ledger.claim("c", claimed)
    assert max(shares) <= 1.0


def test_a_job_that_is_not_running_does_not_say_so(clock):
    """`jobs` and the chip of the page show this word."""
    ledger = Ledger(clock, wall=clock)

    def word() -> str:
        return ledger.status("exp")["exp"]["state"]

    attach(ledger, "p")
    assert word() == "waiting"
    attach(ledger, "c")
    assert word() == "running"
    ledger.control("exp", "paused")
    assert word() == "paused"
    ledger.end("c", "failed", "boom")
    assert word() == "failed"
    attach(ledger, "c2")
    assert word() == "paused"
    ledger.control("exp", "running")
    ledger.end("p", "dead", "killed")
    assert word() == "dead"
    attach(ledger, "p2")
    ledger.end("p2", "stopped", "asked to")
    assert word() == "waiting"
    ledger.end("c2", "stopped", "asked to")
    assert word() == "stopped"


def test_reasons_are_not_cut_in_mid_word(ledger):
    reason = "the engine of rank 17 did not answer " * 20
    ledger.end("p", "failed", reason)
    text = said(ledger)[0][1]
    head = text.partition("...")[0]
    assert head != text
    assert reason.startswith(f"{head.partition('ago: ')[2]} ")
    assert len(text) < 400


def said(ledger: Ledger) -> list[tuple[str, str]]:
    return [(one["level"], one["text"]) for one in ledger.status("exp")["exp"]["standing"]]


def test_what_matters_most_is_said_first(clock):
    ledger = Ledger(clock, wall=clock)
    attach(ledger, "c")
    absent = ("warning", "No rollout job has attached yet: start it with --job-id exp.")
    nobody_knows = ("ok", "No rollouts claimed so far: who waits for whom is said from 4 on.")
    assert said(ledger) == [absent, nobody_knows]
    attach(ledger, "p")
    assert said(ledger) == [nobody_knows]
    ledger.control("exp", "paused")
    assert said(ledger)[0] == ("warning", "Paused by its operator: nothing new is generated until it is resumed.")
    clock.now += 10
    ledger.heartbeat("c", "x")
    silent = "The rollout job gives no sign of life for 10 s of its lease of 30 s, doing: attached. "
    silent += "Look at its log, and whether it hangs."
    assert ("warning", silent) in said(ledger)
    ledger.end("p", "dead", "killed")
    clock.now += 7
    assert said(ledger)[0] == ("error", "The rollout job is dead, for 7 s: killed. Start it again.")
    attach(ledger, "p2")
    publish(ledger, 3, producer="p2")
    ledger.rollouts.payload_lost("exp", "t3")
    ledger.heartbeat("c", "x")
    ledger.end("c", "stopped", "asked to")
    texts = [text for _, text in said(ledger)]
    assert "The train job stopped as asked (asked to): start it to go on." in texts
    assert "1 rollouts are lost (3): generated again on demand." in texts
    clock.now += 700
    ledger.heartbeat("p2", "x")
    idle = "Nothing has happened to a rollout for 12 min: the rollout job waits for the train job to demand a rollout"
    assert [text for _, text in said(ledger) if text.startswith(idle)]
    attach(ledger, "c2", group="archive")
    ledger.end("c2", "failed", "boom")
    assert said(ledger)[0] == ("error", "The consumer group archive failed, 0 s ago: boom. Start it again.")


def test_a_complete_job_has_nothing_else_to_say(ledger):
    publish(ledger, 0)
    train(ledger, 0)
    for client in ("p", "c"):
        ledger.end(client, "finished")
    assert said(ledger) == [("ok", "Complete: 1 rollouts took effect.")]


def test_a_view_asks_for_what_is_new(ledger, clock):
    publish_each(ledger, *range(5))
    first = ledger.look("exp")
    assert [r for r, _ in first["progress"]] == [0, 1, 2, 3, 4]
    assert ledger.look("exp", since=first["seq"])["progress"] == []
    ledger.claim("c", 1)
    ledger.claim("c", 0)
    number = first["events"][-1][0]
    new = ledger.look("exp", since=first["seq"], events_since=number)
    assert [(r, known.state) for r, known in new["progress"]] == [(1, "claimed"), (0, "claimed")]
    assert new["events"] == []
    assert [r for r, _ in ledger.look("exp", limit=2)["progress"]] == [1, 0]
    ledger.end("p", "failed", "boom")
    assert [event.kind for _, event in ledger.look("exp", events_since=number)["events"]] == ["failed"]


def test_memory_is_bounded(ledger, monkeypatch):
    monkeypatch.setattr(history, "PROGRESS", 3)
    monkeypatch.setattr(history, "EVENTS_KEPT", 4)
    for rollout_id in range(9):
        publish(ledger, rollout_id)
        ledger.control("exp", ("paused", "running")[rollout_id % 2])
    job = ledger.jobs["exp"]
    assert [*job.progress] == [6, 7, 8]
    assert [*job.events] == [8, 9, 10, 11]
    assert sum(job.counts.values()) == 11


def test_a_broker_that_restarts_knows_all_of_it(ledger):
    ledger.demand("c", 0)
    ledger.next_demand("p")
    located = publish(ledger, 0, meta={"reward": 1.0})
    ledger.claim("c", 0)
    again = restarted(ledger, located)
    old, new = (book.look("exp") for book in (ledger, again))
    assert new["progress"] == old["progress"]
    assert new["events"] == old["events"]
    assert new["status"]["waited"] == old["status"]["waited"]


def test_spans_are_kept_for_a_while(ledger):
    ledger.heartbeat("c", "training", [("train", 0, 1.0, 2.0)])
    assert ledger.look("exp", spans=True)["spans"] == [("train", 0, 1.0, 2.0, "consumer")]
    assert "spans" not in ledger.look("exp")


def test_spans_end_with_their_job(ledger):
    """Else they mix with those of the next run of that name."""
    for begin_anew in (lambda: ledger.forget("exp"), lambda: None):  # its name is taken when it is complete, too
        ledger.heartbeat("c", "training", [("train", 0, 1.0, 2.0)])
        for client in ("p", "c"):
            ledger.end(client, "finished")
        begin_anew()
        attach_pair(ledger)
        assert ledger.look("exp", spans=True)["spans"] == []
    ledger.heartbeat("c", "training", [("train", 0, 1.0, 2.0)])
    for client in ("p", "c"):
        ledger.end(client, "failed")
    ledger.forget("exp")
    assert ledger.history.spans == {}


# ---------------------------------------------------------------------- steering


def test_requeue_takes_a_lease_away(ledger):
    publish(ledger, 0)
    ledger.claim("c", 0)
    assert "consumer of job exp" in ledger.requeue("exp", 0)
    assert (state(ledger, 0), kinds(ledger)[-1], ledger.jobs["exp"].requeued) == ("published", "requeued", 1)
    with pytest.raises(Exception, match="leased by"):
        ledger.ack("c", 0)
    assert ledger.claim("c").rollout_id == 0


def test_requeue_refuses_what_nobody_holds(ledger):
    publish(ledger, 0)
    with pytest.raises(Refused, match="nobody of group 'train'"):
        ledger.requeue("exp", 0)
    with pytest.raises(RolloutNotFound, match="has no consumer group 'x'"):
        ledger.requeue("exp", 0, "x")


@pytest.mark.parametrize(
    ("operation", "args", "error"),
    [
        ("requeue", (0,), None),
        ("requeue", (1,), Refused),
        ("requeue", (0, "nosuch"), GroupNotFound),
        ("discard", (0,), Refused),
        ("discard", (1, True), None),
        ("discard", (7,), RolloutNotFound),
        ("close_group", ("nosuch",), GroupNotFound),
        ("close_group", ("train",), Refused),
        ("control", ("paused",), None),
        ("control", ("sideways",), BadInput),
    ],
)
def test_an_operator_is_told_before_what_would_be_refused(ledger, operation, args, error):
    publish_each(ledger, 0, 1)
    ledger.claim("c", 0)
    before = encode(ledger.jobs["exp"])
    if error is not None:
        for ask in (lambda: ledger.foresee("exp", operation, *args), lambda: getattr(ledger, operation)("exp", *args)):
            with pytest.raises(error) as raised:
                ask()
            assert type(raised.value) is error
        return
    foreseen = ledger.foresee("exp", operation, *args)
    assert encode(ledger.jobs["exp"]) == before
    assert getattr(ledger, operation)("exp", *args) == foreseen


def test_forgetting_a_job_in_use_is_refused_before(ledger):
    with pytest.raises(Refused, match="is in use"):
        ledger.foresee("exp", "forget")
    with pytest.raises(JobNotFound):
        ledger.foresee("other", "forget")


@pytest.mark.parametrize("same_prompts", [False, True])
def test_discard_has_it_generated_anew(ledger, same_prompts):
    ledger.demand("c", 0)
    ledger.next_demand("p")
    publish(ledger, 0, source="after 0")
    assert ledger.discard("exp", 0, same_prompts) == 10
    assert ("exp", [*ledger.garbage.take_drops()]) == ("exp", [("v1/a", "t0")])
    assert state(ledger, 0) == "demanded"
    assert ledger.next_demand("p") == 0
    assert ledger.source_before("p", 0)[0] == (0 if same_prompts else 1)
    job = ledger.jobs["exp"]
    assert (job.regenerated, job.dropped) == ((1, 0) if same_prompts else (0, 1))


def test_an_operators_wish_whose_answer_was_lost_is_carried_out_once(ledger):
    attach(ledger, "c2")
    publish(ledger, 0)
    publish(ledger, 1)
    ledger.claim("c", 0)
    held_by = ledger.steer("exp", "t0", "requeue", 0)
    nbytes = ledger.steer("exp", "t1", "discard", 1)
    assert ledger.steer("exp", "t2", "control", "paused") == "running"
    ledger.claim("c2", 0)
    again = restarted(ledger, publish(ledger, 1, "t1-again"), *ledger.versions("exp", 0))
    for known in (ledger, again):
        assert known.steer("exp", "t0", "requeue", 0) == held_by
        assert known.steer("exp", "t1", "discard", 1) == nbytes
        assert known.steer("exp", "t2", "control", "paused") == "running"
        assert known.jobs["exp"].groups["train"].leases == {0: ("c2", 1)}
        assert [located.payload.token for located in known.versions("exp", 1)] == ["t1-again"]
    assert decode(encode(ledger.jobs["exp"])).steered == ledger.jobs["exp"].steered
    for number in range(100):
        ledger.steer("exp", f"more{number}", "control", "paused")
    assert len(ledger.jobs["exp"].steered) == ANSWERS
    with pytest.raises(BadInput, match="'forget' is none of control, requeue"):
        ledger.steer("exp", "t3", "forget")


def test_discard_refuses_what_is_held_or_trained_on(ledger):
    ledger.jobs["exp"].retain = 5
    publish(ledger, 0)
    ledger.claim("c", 0)
    with pytest.raises(Refused, match="requeue"):
        ledger.discard("exp", 0)
    ledger.ack("c", 0)
    with pytest.raises(Refused, match="taken effect"):
        ledger.discard("exp", 0)
    with pytest.raises(RolloutNotFound):
        ledger.discard("exp", 7)


def test_detail_says_who_holds_it(ledger):
    publish(ledger, 0)
    publish(ledger, 0, "other")
    attach(ledger, "ca", group="archive")
    ledger.claim("c", 0)
    found = ledger.detail("exp", 0)
    assert [v["version"] for v in found["versions"]] == [1, 2]
    assert found["groups"]["train"]["state"] == "leased"
    assert "consumer of job exp" in found["groups"]["train"]["held_by"]
    assert found["groups"]["archive"] == {"state": "open", "version": None, "held_by": ""}
    with pytest.raises(RolloutNotFound):
        ledger.detail("exp", 9)


def test_5000_rollouts_are_looked_at_quickly(ledger):
    """A guard against what grows with the square: the figures are in scripts/bench.md."""
    import time

    job: Job = ledger.jobs["exp"]
    job.retain = 10_000
    publish_each(ledger, *range(5000))
    began = time.perf_counter()
    for _ in range(5):
        looked(job, 0.0, 0.0, -1, 10_000, 0)
    assert (time.perf_counter() - began) / 5 < 0.25
