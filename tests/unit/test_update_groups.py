"""Ending the groups that a dead train job left: what is told of each engine."""

from types import SimpleNamespace

import pytest
import ray

from slime.cross_job.adapter import update_groups


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"success": True}, "INFO ended the group slime-pp_0"),
        (None, ""),  # slime's SGLangEngine says nothing where there was no group
        (ray.exceptions.RaySystemError("400"), ""),  # before v0.3
        (ray.exceptions.GetTimeoutError(), "WARNING an engine did not end the group slime-pp_0 within 60 s"),
    ],
)
@pytest.mark.parametrize("method", ["destroy_weights_update_group", "_make_request"])
def test_only_a_group_that_was_there_is_called_ended(answer, told, method, monkeypatch, caplog):
    def get(_ref, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    engine = SimpleNamespace(**{method: SimpleNamespace(remote=lambda *_: None)})
    caplog.set_level("INFO", logger=update_groups.logger.name)
    update_groups.end([engine], ["slime-pp_0"])
    lines = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert len(lines) == bool(told)
    assert all(line.startswith(told) for line in lines)
