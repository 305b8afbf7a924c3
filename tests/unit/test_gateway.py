"""The gateway asks the engines before it opens the gate: what they say decides, and what it meant to send does not."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from slime.cross_job.adapter import engine_weights, update_groups, weight_folders
from slime.cross_job.adapter.engine_weights import Said, stamp
from slime.cross_job.adapter.weight_folders import Folder
from slime.cross_job.errors import BadInput, CrossJobError, NotOwner, WrongWeights

URL = "http://node:15000"


class Consumer:
    """Stands for the gateway's client of the broker: what is asked of it comes to `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.connection = self
        self.manager: Any = None
        self.epoch, self.looks = 1, 0

    def producer_facts(self) -> tuple[int, Any]:
        self.looks += 1
        return self.epoch, {"engines": ["a", "b"], "lock": "lock", "manager": self.manager}

    def loaded(self) -> int:
        return 3

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            return 1

        return call


class Engines:
    """Stands for the engines behind `asked`: each takes what an update carries, but for those that ignore it."""

    def __init__(self) -> None:
        self.versions = {"a": stamp("exp", "new"), "b": stamp("exp", "new")}
        self.ignores: set[str] = set()
        self.dead: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    def __call__(self, engines: list[str], what: Any, *args: Any) -> list[Any]:
        return [(engine, what, *args) for engine in engines]

    def answer(self, ref: Any, *_: Any) -> Said:
        engine, what, *args = ref
        if engine in self.dead:
            raise engine_weights.ray.exceptions.RayActorError()
        said = Said(URL, self.versions[engine])
        self.asked.append((what.__name__, engine))
        if what is engine_weights.carry and engine not in self.ignores:
            self.versions[engine] = args[0]
        return said


@pytest.fixture
def engines(monkeypatch):
    made = Engines()
    monkeypatch.setattr(engine_weights, "asked", made)
    monkeypatch.setattr(engine_weights, "get", made.answer)
    monkeypatch.setattr(update_groups, "unlock", lambda lock: None)
    return made


@pytest.fixture
def made(engines, gateway):
    gate = gateway.Gateway.__new__(gateway.Gateway)
    gate._args = SimpleNamespace(job_id="exp", save="x", save_interval=1)
    gate._consumer, gate._unlocked, gate._first = Consumer(), 0, False
    gate._stamp, gate._carrying, gate._lock, gate._carry_lock = "", set(), threading.Lock(), threading.Lock()
    gate._folders = set()
    gate._updating, gate._known, gate._updated, gate._compared = 0, (0, None), None, 1
    return gate


def told(gate: Any) -> list[str]:
    return [name for name, *_ in gate._consumer.calls]


def test_the_gate_opens_with_what_every_engine_says(made, engines):
    epoch = made.begin_update(None, 3)
    assert told(made) == ["begin_update"]
    made.end_update(3, epoch)
    (last,) = {*engines.versions.values()}
    assert last.startswith("exp/3/")
    assert made._consumer.calls[-1] == ("end_update", 3, 1, last)


def test_in_an_update_the_broker_is_not_asked_again_who_the_rollout_job_is(made, engines):
    """Each question to it is some milliseconds, in which neither job does anything."""
    made.end_update(3, made.begin_update(None, 3))
    assert made._consumer.looks == 1
    made._rollout_job()
    assert made._consumer.looks == 2, "between two updates there may be another one"
    epoch = made.begin_update(None, 4)
    assert made._rollout_job()[0] == 1
    made.end_update(4, epoch)
    assert made._consumer.looks == 2


def test_a_rollout_job_that_dies_in_an_update_is_looked_for_anew(made, engines, monkeypatch):
    class Dead:
        class save:
            @staticmethod
            def remote() -> Any:
                made._consumer.epoch = made._compared = 2
                made._consumer.manager = SimpleNamespace(save=SimpleNamespace(remote=lambda: "ref"))
                raise engine_weights.ray.exceptions.RayActorError()

    made._consumer.manager = Dead
    monkeypatch.setattr(made, "_is_over", lambda epoch: True)
    made.begin_update(None, 3)
    made._ask_with_epoch("save")
    assert made._rollout_job()[0] == 2
    with pytest.raises(NotOwner):
        made._engines(1)


def test_one_engine_that_ignored_the_update_keeps_the_gate_shut(made, engines):
    engines.ignores = {"b"}
    epoch = made.begin_update(None, 3)
    before, wanted = engines.versions["b"], engines.versions["a"]
    with pytest.raises(WrongWeights, match=f"weights {wanted}, but {URL} serves {before}"):
        made.end_update(3, epoch)
    assert "end_update" not in told(made)


def test_the_same_weights_once_more_are_told_apart_from_those_of_before(made, engines):
    made.end_update(3, made.begin_update(None, 3))
    engines.ignores = {"a"}
    with pytest.raises(WrongWeights):
        made.end_update(3, made.begin_update(None, 3))


@pytest.mark.parametrize("theirs", ["exp2/3/0badcafe", "7"])
def test_another_jobs_engine_gets_no_weights_and_nobody_waits_for_them(made, engines, theirs):
    engines.versions["b"] = theirs
    with pytest.raises(WrongWeights, match=f"serves weights {theirs}"):
        made.begin_update(None, 3)
    assert told(made) == ["begin_update", "break_update"]


def test_an_engine_that_slime_starts_anew_in_an_update_carries_it_too(made, engines):
    epoch = made.begin_update(None, 3)
    engines.versions["c"] = stamp("exp", "new")
    made._carry(epoch, ["a", None, "c"])
    made._carry(epoch, ["a", "b", "c"])
    assert [engine for what, engine in engines.asked if what == "carry"] == ["a", "b", "c"]
    assert len({*engines.versions.values()}) == 1


def test_engines_that_report_nothing_are_taken_at_slimes_word(made, engines, caplog):
    engines.versions = {"a": None, "b": None}
    engines.ignores = {"a", "b"}
    made.end_update(3, made.begin_update(None, 3))
    assert made._consumer.calls[-1] == ("end_update", 3, 1, "")
    assert "do not say which weights they serve" in caplog.text


def test_an_evaluation_is_of_the_weights_that_were_loaded(made, engines, monkeypatch):
    made.end_update(3, made.begin_update(None, 3))
    monkeypatch.setattr(made, "_ask_with_epoch", lambda *args, **kwargs: (1, "figures"))
    assert made.eval(3) == "figures"
    engines.versions["a"] = stamp("exp", "new")  # it was restarted
    with pytest.raises(WrongWeights, match="after the evaluation of weights 3"):
        made.eval(3)


def test_an_evaluation_whose_rollout_job_ends_with_it_is_done_again_by_the_next(made, engines, monkeypatch):
    made.end_update(3, made.begin_update(None, 3))
    monkeypatch.setattr(made, "_ask_with_epoch", lambda *args, **kwargs: (1, "figures"))
    ends = [NotOwner("the rollout job ended")]
    monkeypatch.setattr(made, "_engines", lambda epoch: (_ for _ in ()).throw(ends.pop()) if ends else ["a", "b"])
    assert made.eval(3) == "figures"
    assert told(made).count("end_update") == 1


def test_an_engine_that_dies_in_an_evaluation_ends_nothing_if_others_answered(made, engines, monkeypatch):
    made.end_update(3, made.begin_update(None, 3))
    monkeypatch.setattr(made, "_ask_with_epoch", lambda *args, **kwargs: (1, "figures"))
    monkeypatch.setattr(made, "_is_over", lambda epoch: False)
    engines.dead = {"a"}
    assert made.eval(3) == "figures"
    engines.versions["b"] = stamp("exp", 2)
    with pytest.raises(WrongWeights, match="after the evaluation of weights 3 the engines should serve"):
        made.eval(3)
    engines.dead = {"a", "b"}
    with pytest.raises(CrossJobError, match="an engine does not say which weights it serves"):
        made.eval(3)


@pytest.mark.parametrize(("left", "stamped"), [([None, None], True), ([], False)], ids=["all dead", "a recording"])
def test_engines_that_slime_will_start_anew_have_to_say_the_stamp(made, engines, monkeypatch, left, stamped):
    epoch = made.begin_update(None, 3)
    monkeypatch.setattr(made, "_engines", lambda epoch: left)
    monkeypatch.setattr(engine_weights, "ask", lambda engines, what, *args: [])
    made.end_update(3, epoch)
    assert made._consumer.calls[-1] == ("end_update", 3, epoch, made._stamp)
    assert bool(made._stamp) == stamped


def test_what_could_not_be_announced_is_announced_again(made, monkeypatch):
    announce, made._told = made._consumer.announce, {}
    monkeypatch.setattr(made._consumer, "announce", lambda facts: (_ for _ in ()).throw(OSError()), raising=False)
    with pytest.raises(OSError):  # noqa: PT011  whatever it is
        made._announce(arguments={"--seed": 1})
    monkeypatch.setattr(made._consumer, "announce", announce)
    made._announce(arguments={"--seed": 1})
    assert made._consumer.calls[-1] == ("announce", {"arguments": {"--seed": 1}})


@pytest.fixture
def folders(made, monkeypatch):
    """folders(owner, newest...): as many hosts with a local checkpoint; what the gateway makes of them."""

    def look(owner: str, *newest: int | None, alive: bool = False) -> int:
        def local(engines: Any, what: Any, job_id: str, gone: str = "") -> list[Folder]:
            return [Folder("/local", f"host{n}", n, job_id if gone == owner else owner) for n in newest]

        monkeypatch.setattr(engine_weights, "ask", local)
        monkeypatch.setattr(engine_weights, "lives", lambda connection, job_id: alive)
        monkeypatch.setattr(weight_folders, "published", lambda path, *who: Folder(path, "here", 2, "exp"))
        monkeypatch.setattr(made, "_ask_with_epoch", lambda *args: (1, ["a"] * len(newest)))
        made._args.update_weight_disk_dir, made._args.update_weight_local_checkpoint_dir = "/disk", "/local"
        return made.newest_update()

    return look


def test_updates_go_on_behind_the_greatest_number_that_any_host_has(folders):
    assert folders("exp", 0) == 2
    assert folders("exp", 7, 50, 3) == 50


def test_a_folder_of_a_job_that_is_gone_is_taken_over_and_one_of_a_living_job_is_not(folders):
    assert folders("exp2", 50) == 50
    with pytest.raises(WrongWeights, match="the folder /local on host50 holds the weights of job exp2, which runs"):
        folders("exp2", 50, alive=True)


def test_a_folder_that_was_this_jobs_and_is_anothers_now_is_in_use(made, engines, tmp_path):
    """As by a job of another namespace or cluster, of which this broker knows nothing."""
    made._args.update_weight_disk_dir, made._args.update_weight_local_checkpoint_dir = str(tmp_path), None
    assert made.newest_update() == made.newest_update() == 0
    weight_folders.published(str(tmp_path), "exp2", "exp")
    with pytest.raises(WrongWeights, match=f"the folder {tmp_path} on .* holds the weights of job exp2, which runs"):
        made.newest_update()


def test_a_host_that_nobody_can_look_into_is_refused(folders):
    with pytest.raises(
        BadInput, match="--update-weight-local-checkpoint-dir /local lies on hosts of external engines"
    ):
        folders("", None)


def test_what_the_driver_said_last_of_its_work_counts_in_whatever_order_it_arrives(made):
    made._said_of_work = 0
    for number, at_work in ((2, True), (1, False), (3, False)):
        made.working(number, at_work)
    assert made._consumer.calls == [("working", True), ("working", False)]
