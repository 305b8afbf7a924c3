"""The examples of the page cross-job-api.md: the first two as submitted jobs, the others one after the other."""

import re

import pytest

from tests.support.ray_jobs import ROOT

PAGE = ROOT / "slime_overlay" / "docs" / "en" / "advanced" / "cross-job-api.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
JOBS = {name[1]: block for block in BLOCKS if (name := re.match(r"# (\w+\.py)\n", block))}


@pytest.mark.core
def test_the_two_jobs_of_the_page_train(submit, tmp_path):
    assert [*JOBS] == ["rollout_job.py", "train_job.py"]
    for name, block in JOBS.items():
        (tmp_path / name).write_text(block)
    jobs = [submit(tmp_path / name) for name in JOBS]
    assert [job.wait() for job in jobs] == ["SUCCEEDED"] * 2, [job.logs for job in jobs]
    read = [line.split() for line in jobs[1].logs.splitlines() if re.match(r"\d \d \[", line)]
    assert len(read) == 6, jobs[1].logs
    assert {line[0] for line in read} == {"0", "1", "2"}


@pytest.mark.core
def test_the_other_examples_of_the_page_hold(driver):
    names: dict[str, object] = {"__name__": "examples"}
    others = [block for block in BLOCKS if block not in JOBS.values()]
    assert len(others) >= 7
    for block in others:
        exec(compile(block, PAGE.name, "exec"), names)
