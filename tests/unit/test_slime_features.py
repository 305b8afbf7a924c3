"""cross-job-features.md: each feature of slime has a test, and what a cell says is what the tests' outcomes say."""

import json
import os
from dataclasses import replace

import pytest

from tests.slime import features
from tests.slime.features import FEATURES, Feature, cases, cell, is_gone, kept_outcomes, merged, outcomes_of, page
from tests.slime.single_job import PINS

AGREE = "unit/test_handshake.py::test_from_v03_on_the_number_of_engines_is_the_rollout_jobs_own_affair"
LAYOUTS = "slime/test_features.py::test_model_parallel_layouts"
PASSED, FAILED = ({"outcome": outcome, "s": 9, "date": "2026-01-02"} for outcome in ("passed", "failed"))
TESTS = sorted({test for feature in FEATURES for test in feature.tests})


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_each_feature_has_a_test_that_exists(feature):
    assert [test for test in feature.tests if not cases(test)] == []
    assert feature.tests
    assert any(pin in cases(test) for test in feature.tests for pin in feature.pins)
    assert "|" not in feature.name + feature.text


def test_the_page_is_what_is_made_of_features_and_outcomes():
    assert features.PAGE.read_text() == page(kept_outcomes()), "run: python -m tests.slime.features"


def test_outcomes_are_kept_of_tests_that_are_there():
    kept = kept_outcomes()
    assert [test for test in kept if is_gone(test)] == [], "run: python -m tests.slime.features"
    for test in {test.partition("[")[0] for test in kept}:
        for pin, number in cases(test).items():
            ended = outcomes_of(test, pin, kept)
            more = f"{test} has fewer cases than outcomes: take these out of {features.OUTCOMES.name}, run it again"
            assert not number or len(ended) <= number, more


def test_what_a_cell_says():
    ids = [f"{LAYOUTS}[{case}-v0.3.1]" for case in ("tp", "tp-dp", "pp", "cp", "dynamic-batch", "tp-pp-nccl")]
    whole, one = (Feature("x", "", (test, AGREE), pins=PINS[1:]) for test in (LAYOUTS, f"{LAYOUTS}[tp]"))
    passed = dict.fromkeys([*ids, AGREE], PASSED)
    said = lambda feature, outcomes: [cell(feature, pin, outcomes) for pin in PINS]  # noqa: E731
    assert said(whole, passed) == said(one, passed) == ["-", "no test", "runs", "not run yet"]
    assert said(replace(whole, shown="partly"), passed)[2] == "partly"
    for missing in (ids[0], AGREE):
        less = {test: kept for test, kept in passed.items() if test != missing}
        assert said(whole, less)[2] == said(one, less)[2] == "not run yet"
        assert said(one, passed | {missing: FAILED})[2] == "**FAILED**"
    assert said(whole, passed | {ids[1]: FAILED})[2] == "**FAILED**"
    assert said(one, passed | {ids[1]: FAILED})[2] == "runs", "tp-dp is another case"
    unit = replace(whole, tests=(AGREE,))
    assert said(unit, passed) == ["-", *["unit tests"] * 3]
    assert said(replace(unit, shown="refused"), passed) == ["-", *["refused"] * 3]
    assert said(replace(unit, shown="refused"), {}) == ["-", *["not run yet"] * 3]


def test_the_newest_outcome_counts_and_those_of_others_are_left_out(tmp_path):
    test = f"{LAYOUTS}[tp-main]"
    gone = ("slime/test_features.py::test_gone[main]", f"{LAYOUTS}[tp-v0.1.0]", f"{LAYOUTS}[tp]")
    others = ("unit/test_x.py::test_y", *gone)
    older, newer = tmp_path / "newer", tmp_path / "a file that was written before"
    told = [{"test": one, **PASSED} for one in (test, AGREE, *others)]
    older.write_text("".join(json.dumps(line) + "\n" for line in told))
    newer.write_text(json.dumps({"test": test, **FAILED}) + "\n")
    os.utime(older, (1, 1))
    assert merged({}, [newer, older]) == {test: FAILED, AGREE: PASSED}
    assert merged({}, [older]) == {test: PASSED, AGREE: PASSED}
    assert merged({test: {**FAILED, "date": "2026-01-03"}}, [older])[test]["outcome"] == "failed"
    newer.write_text(json.dumps({"test": test, **FAILED, "outcome": "skipped"}) + "\n")
    assert merged({}, [newer, older])[test] == PASSED
