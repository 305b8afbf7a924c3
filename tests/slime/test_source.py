"""slime's own source of prompts goes on elsewhere as if nothing had happened, the half-generated samples included."""

from slime_jobs import at_pins, end_well


@at_pins(again=("079dbcf", "v0.1.0", "v0.3.1"))
def test_a_source_goes_on_where_another_stood(pin, new_run):
    run = new_run(pin, "source")
    job = run.start_script("source_state.py")
    end_well(job)
    said = job.said()
    assert said["second"] == said["first"]
    assert len(said["first"]["buffer"]) == 2
    assert said["first"]["buffer"][1][1]["status"] == "aborted"
    assert said["untouched"] != said["first"], "every source stands there: nothing was shown"
