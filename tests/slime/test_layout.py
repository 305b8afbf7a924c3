"""A train job of another layout gets what slime would have split for it, also of what was published before."""

from tests.slime import layouts
from tests.slime.slime_jobs import at_pins, end_well


@at_pins(also=("v0.3.1", "main"))
def test_a_rollout_that_is_split_anew_is_what_slime_splits_for_that_layout(pin, new_run):
    job = new_run(pin, "layouts").start(layouts.__file__)
    end_well(job)
    told = job.all_said(len(layouts.WAYS) * len(layouts.LAYOUTS) ** 2)
    assert [case for case in told if case["differences"]] == []
