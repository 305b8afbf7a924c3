"""The job's figures under `cross_job/`, at pins of slime with a logging of their own and without; stand-ins for its
module, for wandb, and for the producer, which is asked for the real ledger's status."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slime.cross_job.adapter.names import PLACES, of_slime
from slime.cross_job.adapter.tracking import Tracking, named, share_run
from slime.cross_job.errors import BadInput
from tests.support.ledger import attach, publish, restarted


class Asked:
    """Stands for a Producer: it has the status of the real ledger."""

    job_id = "exp"

    def __init__(self, ledger: Any, metrics: bool = True):
        self.ledger, self.metrics, self.asked = ledger, metrics, 0

    def status(self) -> dict[str, Any]:
        self.asked += 1
        return self.ledger.status("exp")["exp"]


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """Stands for wandb; `logged` and `defined` are what it was told."""
    stand_in: Any = ModuleType("wandb")
    stand_in.logged, stand_in.defined = [], []
    stand_in.log = stand_in.logged.append
    stand_in.define_metric = lambda *args, **kwargs: stand_in.defined.append((args, kwargs))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for module in PLACES["log"]:
        monkeypatch.setitem(sys.modules, module, None)
    return stand_in


@pytest.fixture(params=PLACES["log"])
def slimes(monkeypatch, wandb, request) -> list[tuple[Any, dict[str, float], str]]:
    """Stands for slime's logging_utils from v0.3 on; what it was told."""
    told: list[tuple[Any, dict[str, float], str]] = []
    module: Any = ModuleType(request.param)
    module.log = lambda args, metrics, step_key: told.append((args, metrics, step_key))
    monkeypatch.setitem(sys.modules, request.param, module)
    return told


def test_figures_have_names_in_one_folder(pair):
    publish(pair, 0)
    found = named(pair.status("exp")["exp"])
    assert found["cross_job/rollouts_total/published"] == 1
    assert found["cross_job/queue_rollouts"] == 1
    assert found["cross_job/wait_seconds_total/producer/demand"] == 0
    assert all(name.startswith("cross_job/") for name in found)


def test_slimes_own_logging_gets_them_where_there_is_one(pair, slimes, wandb):
    args = SimpleNamespace(use_wandb=False, use_tensorboard=True)
    publish(pair, 0)
    Tracking(args, Asked(pair)).published(7)
    ((told_args, metrics, step_key),) = slimes
    assert (told_args, step_key, metrics["rollout/step"]) == (args, "rollout/step", 7)
    assert metrics["cross_job/rollouts_total/published"] == 1
    assert not wandb.defined, "wandb is not used"


def test_an_older_slime_has_wandb_alone(pair, wandb):
    tracking = Tracking(SimpleNamespace(use_wandb=True), Asked(pair))
    for rollout_id in range(2):
        tracking.published(rollout_id)
    assert [told["rollout/step"] for told in wandb.logged] == [0, 1]
    assert wandb.defined == [(("cross_job/*",), {"step_metric": "rollout/step"})]


@pytest.mark.parametrize(
    ("args", "metrics"),
    [
        (SimpleNamespace(use_wandb=False), True),
        (SimpleNamespace(), True),
        (SimpleNamespace(use_wandb=True, use_tensorboard=True), False),
    ],
)
def test_nobody_is_asked_where_nobody_wants_to_know(pair, wandb, args, metrics):
    producer = Asked(pair, metrics)
    Tracking(args, producer).published(0)
    assert (producer.asked, wandb.logged) == (0, [])


def test_a_failure_is_said_once_and_hurts_nobody(pair, wandb, caplog):
    def fail(told: Any) -> None:
        raise OSError("disk full")

    wandb.log = fail
    tracking = Tracking(SimpleNamespace(use_wandb=True), Asked(pair))
    for rollout_id in range(3):
        tracking.published(rollout_id)
    assert [record.getMessage() for record in caplog.records] == [
        "job exp: its figures are not in wandb or TensorBoard (logged once): OSError: disk full"
    ]


@pytest.fixture
def environ(monkeypatch) -> dict[str, str]:
    """This process' environment, without wandb's variables in it; it is put back."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return os.environ


def test_both_jobs_and_their_restarts_are_one_run_in_wandb(pair, environ, caplog):
    found = []
    for name, given in (("p", None), ("c", None), ("c", "mine")):
        environ.pop("WANDB_RUN_ID", None)
        if given:
            environ["WANDB_RUN_ID"] = given
        args = SimpleNamespace(use_wandb=True, job_id="exp")
        share_run(args, lambda *said, name=name: pair.agree(name, *said))
        found.append((environ["WANDB_RUN_ID"], environ.pop("WANDB_RESUME")))
    assert len({*found}) == 1
    assert found[0][1] == "allow"
    assert len(found[0][0]) == 8
    assert "WANDB_RUN_ID=mine is not used" in caplog.text


def test_a_run_that_the_user_names_is_the_run_of_both_jobs(pair, environ):
    environ["WANDB_RUN_ID"] = "mine"
    share_run(SimpleNamespace(use_wandb=True, job_id="exp"), lambda *said: pair.agree("c", *said))
    del environ["WANDB_RUN_ID"]
    share_run(SimpleNamespace(use_wandb=True, job_id="exp"), lambda *said: pair.agree("p", *said))
    assert environ["WANDB_RUN_ID"] == "mine"


def test_without_wandb_nothing_is_agreed_on(pair):
    share_run(SimpleNamespace(use_wandb=False), lambda *said: pair.agree("c", *said))
    assert pair.jobs["exp"].agreed == {}


def test_what_a_job_agreed_on_outlives_its_clients_and_its_broker(pair):
    pair.agree("p", "wandb run id", "first")
    pair.end("p", "failed")
    again = restarted(pair)
    attach(again, "p-again")
    assert again.agree("p-again", "wandb run id", "second") == "first"
    with pytest.raises(BadInput):
        again.agree("p-again", "wandb run id", "")


def test_figures_for_tensorboard_do_not_vanish_where_slimes_logging_moved(pair, wandb, caplog):
    publish(pair, 0)
    Tracking(SimpleNamespace(use_tensorboard=True), Asked(pair)).published(0)
    assert "this slime has no log in slime.observability.logging_utils or slime.utils.logging_utils" in caplog.text
    assert wandb.logged == [], "wandb is not used"


def test_an_import_that_fails_within_slime_is_told_as_it_is(monkeypatch, tmp_path):
    (tmp_path / "place_of_box.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PLACES, "Box", ("place_of_box", "slime.nowhere"))
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        of_slime("Box")
    monkeypatch.setitem(PLACES, "Box", ("slime.nowhere", "slime.cross_job.adapter.names"))
    with pytest.raises(ImportError, match="this slime has no Box in"):
        of_slime("Box")
