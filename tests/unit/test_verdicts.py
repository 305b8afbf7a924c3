"""What is said to somebody who waited: who it was, when it was last heard, what to do."""

import pytest

from slime.cross_job.ledger.state import DEAD, FAILED, FINISHED, Client
from slime.cross_job.ledger.verdicts import verdict, who
from slime.cross_job.types import ClientInfo


def described(state: str = "live", reason: str = "", beat: float = 990.0) -> Client:
    info = ClientInfo(
        "id", "exp", "producer", ray_job_id="02000000", submission_id="raysubmit_1", host="node7", pid=4711
    )
    return Client(info, 3, 30.0, 900.0, beat, "publishing rollout 5", state, reason)


WHO = "producer of job exp (epoch 3, Ray job 02000000 (raysubmit_1), pid 4711 on node7)"


@pytest.mark.parametrize(
    ("peer", "kind", "message"),
    [
        (None, "absent", "no rollout job has attached to job exp yet: start it with --job-id exp, on this cluster"),
        (
            described(beat=998.0),
            "alive",
            f"the {WHO} gave its last sign of life 2.0 s ago, doing: publishing rollout 5",
        ),
        (described(beat=998.0), "alive", "; it is still at work: allow more time"),
        (described(), "slow", f"the {WHO} gave its last sign of life 10.0 s ago, doing: publishing rollout 5"),
        (described(), "slow", "; it may be stuck: look at its log"),
        (described(beat=400.0), "slow", "gave its last sign of life 10 min ago"),
        (described(FINISHED), "finished", f"the {WHO} finished"),
        (described(FINISHED, "all 100 steps"), "finished", f"the {WHO} finished: all 100 steps"),
        (
            described(FAILED, "ValueError: boom"),
            "failed",
            f"the {WHO} failed: ValueError: boom; mend it and start the",
        ),
        (described(DEAD, "its Ray job is FAILED"), "dead", f"the {WHO} is dead: its Ray job is FAILED; it was last"),
        (
            described(DEAD, "its Ray job is FAILED"),
            "dead",
            "Start the rollout job again: the rollouts that were published are",
        ),
    ],
)
def test_verdicts(peer, kind, message):
    found = verdict(peer, "producer", "exp", now=1000.0)
    assert found["kind"] == kind
    assert message in found["message"]
    if peer is not None:
        facts = {"who": WHO, "activity": "publishing rollout 5", "ray_job_id": "02000000", "state": peer.state}
        assert {name: found[name] for name in facts} == facts
        assert found["silent_s"] == 1000.0 - peer.last_beat
        assert found["reason"] == peer.reason


def test_a_verdict_of_the_other_side_names_it():
    assert verdict(None, "consumer", "exp", 0.0)["message"].startswith("no train job has attached")
    consumer = Client(ClientInfo("id", "exp", "consumer", group="archive"), 1, 30.0, 0.0, 0.0)
    assert who(consumer) == "consumer of job exp (epoch 1, group archive, Ray job ?, pid 0 on ?)"


def test_what_lasts_long_says_how_long():
    client = described(beat=999.0)
    client.since = 940.0
    found = verdict(client, "producer", "exp", now=1000.0)
    assert "doing: publishing rollout 5, for 60 s by now; it is still at work" in found["message"]
    assert found["activity_s"] == 60.0
