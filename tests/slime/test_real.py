"""Real SGLang server, router and megatron-core training, launched as users launch them: the split pair learns."""

from itertools import pairwise
from statistics import mean

from tests.slime import single_job
from tests.slime.slime_jobs import at_pins

ROLLOUTS = 18


@at_pins(also=("v0.3.1", "main", "079dbcf"))
def test_the_split_pair_learns_on_real_parts(pin, new_run):
    run = new_run(pin, "real", engine="sglang", probe=True, options={"num_rollout": ROLLOUTS})
    jobs = {role: run.launch(role) for role in ("rollout", "train")}
    try:
        codes = run.codes(jobs)
    finally:
        for job in jobs.values():
            job.kill()
    logs = {role: run.told(role) for role in jobs}
    assert codes == {"rollout": 0, "train": 0}, "\n".join(log[-5000:] for log in logs.values())

    rewards = [reward for (reward,) in run.steps("raw_reward")]
    assert len(rewards) == ROLLOUTS
    assert mean(rewards[-4:]) > 3 * mean(rewards[:4]), f"the reward did not climb: {rewards}"
    probes = single_job.read_log(run.folders.log, "probe")
    servers = [probe["servers"][0] for probe in probes]
    assert len(servers) >= ROLLOUTS
    assert all(one["checksum"] != other["checksum"] for one, other in pairwise(servers)), "an update did not arrive"
    assert max(server["max_logprob_diff"] for server in servers) < 1e-3, "trainer and server disagree on log-probs"
    print(f"{pin}: rewards {rewards}, log-probs differ by {max(server['max_logprob_diff'] for server in servers):.1e}")
