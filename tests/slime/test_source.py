"""slime's source of prompts goes on elsewhere as if nothing had happened, the half-generated samples included."""

from tests.slime.single_job import IN_PARTS
from tests.slime.slime_jobs import at_pins, end_well


@at_pins("079dbcf", "v0.1.0", "v0.3.1", "main")
def test_a_source_goes_on_where_another_stood(pin, new_run, tmp_path):
    run = new_run(pin, "source")
    job = run.start_script("source_state.py", *([str(tmp_path)] if pin in IN_PARTS else []))
    end_well(job)
    said = job.said()
    assert said["second"] == said["first"]
    assert said["first"].count("'status': 'aborted'") == 4
    assert "{4: 0.25}" in said["first"]
    assert "tensor" in said["first"]
    assert said["untouched"] != said["first"], "every source stands there: nothing was shown"
    if pin in IN_PARTS:
        assert said["custom"] == {"first": 5, "second": 5, "third": 9, "trained": 9}
    taken = said["measured"]
    assert taken["times"] < 1.1, taken
    assert taken["state_s"] < 20 * taken["copy_s"] + 0.5, taken
