"""Users' own code in a rollout: turns, tools, samples that fan out, rewards; and what slime writes for debugging."""

import numpy as np
import pytest
import torch

from tests.slime.equal import differences
from tests.slime.slime_jobs import FIGURES, at_pins, end_well

ROLLOUTS = 3
WAYS = {  # name: (number of engines, flags of both jobs)
    "four-engines": (4, ("--actor-num-gpus-per-node", "1", "--use-rollout-logprobs")),
    "top-p": (2, ("--custom-reward-post-process-path", "agent.mean", "--rollout-top-p", "0.9", "--use-tis")),
}
MOVES = {"session_id", "trace", "weight_versions"}  # in slime's dumps, and another in each run


@at_pins(also=("v0.3.1", "main"))
@pytest.mark.parametrize("name", WAYS)
def test_an_agent_with_a_tool_whose_samples_fan_out(pin, name, new_run):
    """Two optimizer steps a rollout. What slime dumps of rollouts and training data is the same, too."""
    engines, flags = WAYS[name]
    steps, dumped = {}, {}
    for jobs in ("single", "split"):
        run = new_run(pin, jobs, options={"num_rollout": ROLLOUTS, "engines": engines, "global_batch_size": 32})
        run.extra = (
            *("--custom-generate-function-path", "agent.generate", "--num-steps-per-rollout", "2", *flags),
            *("--custom-rm-path", "agent.score", "--reward-key", "score", "--rollout-max-response-len", "32"),
            *("--dump-details", str(run.root / "dump")),
        )
        end_well(*([run.start("train.py", *run.extra)] if jobs == "single" else [run.rollout_job(), run.train_job()]))
        steps[jobs] = run.steps(*FIGURES, "columns", "micro_batches")
        dumped[jobs] = dumps(run.root / "dump")
    assert [step[:2] for step in steps["single"]] == [
        (rollout, step) for rollout in range(ROLLOUTS) for step in (0, 1)
    ]
    assert steps["split"] == steps["single"]
    assert dumped["split"].keys() == dumped["single"].keys()
    assert len(dumped["single"]) >= 2 * ROLLOUTS
    assert differences("dump", dumped["single"], dumped["split"]) == []
    samples = dumped["single"]["rollout_data/0.pt"]["samples"]
    assert len({sample["rollout_id"] for sample in samples}) == 64 < len(samples), "nothing fanned out"
    assert any(0 in (sample["loss_mask"] or ()) for sample in samples), "no tool has answered"
    assert all("rollout_log_probs" in columns for *_, columns, _ in steps["split"])
    if name == "top-p":
        assert all("rollout_top_p_token_ids" in columns for *_, columns, _ in steps["split"])


def dumps(folder):
    """What slime wrote below a folder, by its path in there."""
    found = {}
    for path in sorted(folder.rglob("*.pt")):
        found[str(path.relative_to(folder))] = content = plain(torch.load(path, weights_only=False))
        for sample in content.get("samples", ()):
            for name in MOVES:
                sample.pop(name, None)
    return found


def plain(value):
    """Numbers of NumPy as Python's, which they are in another job."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
