"""A dumped rollout gives the same process_rollout_data on every rank, bit for bit, in one job and across two."""

from tests.slime import equal
from tests.slime.equal import CASES
from tests.slime.slime_jobs import at_pins, end_well


@at_pins("v0.3.1", also=("main", "079dbcf", "v0.1.0"))
def test_every_rank_reads_what_it_would_read_in_a_single_job(pin, new_run, tmp_path):
    run = new_run(pin, "equal")
    dumped = ("--load-debug-rollout-data", str(tmp_path / "dumped" / "{rollout_id}.pt"))
    rollout = run.rollout_job(*dumped, script=equal.__file__)
    train = run.train_job(*dumped, script=equal.__file__)
    end_well(rollout, train)
    told = train.all_said(len(CASES))
    assert [tuple(case["case"]) for case in told] == CASES
    assert [case["differences"] for case in told] == [[]] * len(CASES)
    for case in told:
        assert {"tokens", "loss_masks", "rewards", "raw_reward", "response_lengths", "total_lengths"} <= {
            *case["keys"]
        }
        log_probs = bool(case["case"][2]) and pin != "079dbcf"  # which knows none
        assert ("rollout_log_probs" in case["keys"]) == log_probs
        assert ("round_number" in case["keys"]) == (case["case"][3] == "second")
