"""slime's groups of training actors in a train job: what is told when, of PPO's actor and critic.

`Group` stands in for slime's RayTrainGroup from v0.3 on, `Side` for the driver; the loop is that of slime's train.py.
"""

import contextlib
import importlib
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slime.cross_job.client import shutdown
from slime.cross_job.errors import Stopped, WrongWeights


class Group:
    def __init__(self, role: str, did: list[str]):
        self.role, self.did = role, did

    def async_train(self, rollout_id: int, *args: Any, **kwargs: Any) -> list[Any]:
        self.did.append(f"{self.role} trains {rollout_id}")
        return [f"{self.role} {rollout_id}"]

    def save_model(self, rollout_id: int, force_sync: bool = False) -> None:
        self.did.append(f"{self.role} saves {rollout_id}" + " at once" * force_sync)


class Side:
    in_parts = True

    def __init__(self, **args: Any):
        self.args = SimpleNamespace(use_critic=True, num_critic_only_steps=2, async_save=False, save="folder")
        vars(self.args).update(args)
        self.lock, self.trained, self.saved, self.acked = contextlib.nullcontext(), -1, -1, list[int]()
        self.settings, self.save, self.steps, self.ended = SimpleNamespace(), None, list[Any](), False
        self.at_work, self.began, self.spans = dict[int, bool](), list[int](), list[tuple[str, int]]()
        nothing = SimpleNamespace(remote=lambda *_: None)
        self.gateway = SimpleNamespace(working=SimpleNamespace(remote=self.at_work.__setitem__), doing=nothing)

    def add_span(self, what: str, rollout_id: int, began: float, ended: float) -> None:
        self.spans.append((what, rollout_id))

    def ask(self, method: str, rollout_id: int) -> None:
        {"saved": self.acked, "noted": self.began}[method].append(rollout_id)

    def send(self, method: str, rollout_id: int) -> Any:
        assert method == "training"
        return lambda: self.ask("noted", rollout_id)


@pytest.fixture
def train_group(train_driver: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A step ends at once, unless a test says otherwise."""
    module = importlib.import_module("slime.cross_job.adapter.train_group")
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: (refs, []))
    yield module
    del sys.modules["slime.cross_job.adapter.train_group"]


def trained(train_group: Any, side: Side, until: int, save_interval: int = 1) -> list[str]:
    """What the groups do in slime's loop."""
    did: list[str] = []
    actor, critic = Group("actor", did), Group("critic", did) if side.args.use_critic else None
    train_group.adopt(actor, side, critic)
    for rollout_id in range(until):
        actor_trains = critic is None or rollout_id >= side.args.num_critic_only_steps
        if critic is not None:
            critic.async_train(rollout_id, "data")
        if actor_trains:
            actor.async_train(rollout_id, "data", external_data=[])
        if (rollout_id + 1) % save_interval == 0:
            if actor_trains:
                actor.save_model(rollout_id, force_sync=False)
            if critic is not None:
                critic.save_model(rollout_id, force_sync=False)
    return did


def test_what_the_critic_alone_saved_is_acked(train_group):
    side = Side()
    did = trained(train_group, side, 4)
    assert did[:2] == ["critic trains 0", "critic saves 0"]
    assert did[-4:] == ["critic trains 3", "actor trains 3", "actor saves 3", "critic saves 3"]
    assert side.acked == [0, 1, 2, 3], "each once both have saved it"
    assert [side.trained, side.saved] == [3, 3]
    assert side.began == [0, 1, 2, 3], "once, though both groups train on it"


def test_the_ranks_begin_while_the_broker_notes_what_they_train_on(train_group):
    side, did = Side(use_critic=False), list[str]()
    side.send = lambda method, rollout_id: did.append("told") or (lambda: did.append("noted"))
    actor = Group("actor", did)
    train_group.adopt(actor, side)
    actor.async_train(0, "data")
    assert did == ["told", "actor trains 0", "noted"]


def test_an_asynchronous_checkpoint_is_acked_once_the_next_one_begins(train_group):
    side = Side(async_save=True)
    trained(train_group, side, 4)
    assert side.acked == [-1, 0, 1, 2]
    assert [*side.at_work.values()][-1] is False, "it only waits after that"


def test_without_a_critic_the_actors_checkpoint_is_what_counts(train_group):
    side = Side(use_critic=False)
    trained(train_group, side, 4, save_interval=2)
    assert side.acked == [1, 3]


@pytest.mark.parametrize(
    ("after", "saves"),
    [
        (1, ["critic saves 0 at once"]),
        (4, ["actor saves 3 at once", "critic saves 3 at once"]),
    ],
)
def test_a_driver_that_is_to_stop_saves_what_was_trained_of_both(train_group, after, saves):
    side = Side()
    did = trained(train_group, side, after, save_interval=99)
    did.clear()
    side.save(side.trained)
    assert did == saves
    assert side.acked == [after - 1]


def test_a_wish_to_stop_comes_between_rollouts_not_between_critic_and_actor(train_group, monkeypatch):
    side, did = Side(num_critic_only_steps=0), list[str]()
    actor, critic = Group("actor", did), Group("critic", did)
    train_group.adopt(actor, side, critic)
    critic.async_train(0, "data")
    monkeypatch.setattr(shutdown, "requested", SimpleNamespace(is_set=lambda: True))
    actor.async_train(0, "data")
    with pytest.raises(Stopped):
        critic.async_train(1, "data")
    assert did == ["critic trains 0", "actor trains 0"]


@pytest.fixture
def ends(train_group, monkeypatch):
    """ends(ref): the ranks are through with the step of this ref."""
    waiting = dict[str, Any]()

    def thread(target: Any, args: tuple[Any, ...], daemon: bool) -> Any:
        return SimpleNamespace(start=lambda: waiting.update({args[0][0]: lambda: target(*args)}))

    monkeypatch.setattr(train_group, "threading", SimpleNamespace(Thread=thread, Lock=threading.Lock))
    return lambda ref: waiting[ref]()


@pytest.mark.parametrize("role", ["critic", "actor"])
def test_a_step_that_no_update_follows_ends_by_itself(train_group, ends, role):
    """As with --update-weights-interval: the driver waits for the next rollout then, and a stuck job is to be seen."""
    side = Side(num_critic_only_steps=0)
    actor, critic = Group("actor", []), Group("critic", [])
    train_group.adopt(actor, side, critic)
    critic.async_train(0, "data")
    if role == "actor":
        actor.async_train(0, "data")
        ends("critic 0")
    assert [*side.at_work.values()][-1] is True, "the step goes on"
    ends(f"{role} 0")
    assert [*side.at_work.values()][-1] is False
    assert side.spans[-1] == ("train", 0)


def test_the_end_of_a_step_does_not_end_what_is_done_by_then(train_group, ends):
    side = Side(use_critic=False)
    actor = Group("actor", [])
    train_group.adopt(actor, side)
    actor.async_train(0, "data")
    actor.cross_job.phase("weights", 0)
    ends("actor 0")
    assert [*side.at_work.values()][-1] is True


class Updating(Group):
    """Stands in for slime's group of training actors, which numbers its updates over disk."""

    def __init__(self, did: list[str]):
        super().__init__("actor", did)
        self._disk_weight_version, self._actor_handlers = 0, ["rank0", "rank1"]

    def _full_disk_weight_update_enabled(self) -> bool:
        return True

    def update_weights(self) -> None:
        self._disk_weight_version += 1
        self.did.append(f"update {self._disk_weight_version}")


class Asked(Side):
    """What the gateway answers; a method whose answer is an error raises it."""

    def __init__(self, **answers: Any):
        super().__init__(use_critic=False, num_rollout=9, job_id="exp")
        self.settings.update_timeout_s = 3600.0
        self.answers, self.broken, self.died = answers, list[int](), list[BaseException]()
        self.resources, self.weight_version = SimpleNamespace(stop=lambda: None), 3
        self.gateway.break_update = SimpleNamespace(remote=self.broken.append)
        self.gateway.unloaded = SimpleNamespace(remote=lambda *_: None)
        self.die = self.died.append

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.answers.get(method), Exception):
            raise self.answers[method]
        return self.answers.get(method)


def test_updates_go_on_behind_the_newest_number_and_count_up_from_there(train_group, monkeypatch):
    side, did, told = Asked(newest_update=50), list[str](), list[Any]()
    group = Updating(did)
    monkeypatch.setattr(train_group.ray, "get", lambda refs: told.extend(refs))
    counts = lambda rank: SimpleNamespace(  # noqa: E731
        __ray_call__=SimpleNamespace(remote=lambda what, number: (rank, what.__name__, number))
    )
    group._actor_handlers = [counts("rank0"), counts("rank1")]
    train_group.adopt(group, side, None)
    group._push()
    side.answers["newest_update"] = 51
    group._push()
    assert did == ["update 51", "update 52"]
    assert told == [("rank0", "count_from", 50), ("rank1", "count_from", 50)], "it is told once"


def test_engines_with_other_weights_end_the_train_job(train_group, monkeypatch):
    """In its own update, and in that which a new rollout job's engines get from the background."""
    wrong = WrongWeights("the engines should serve weights exp/3/a, but http://node serves exp/2/b")
    side = Asked(begin_update=1, end_update=wrong)
    updates = train_group.Updates(side)
    with pytest.raises(WrongWeights):
        updates.run(lambda: None, lambda: None)
    assert side.broken == [1], "the engines are not held for good"
    monkeypatch.setattr(train_group, "get", lambda *_: 2)
    updates._serve(lambda: None, lambda: None)
    assert side.died == [wrong]


def test_the_limit_of_an_update_begins_when_the_ranks_are_through_with_their_step(train_group, monkeypatch):
    """As where a rollout job is started again while a step is under way that takes longer than the limit."""
    side, did = Asked(begin_update=1), list[str]()
    side.steps, side.ended = ["step of rank0", "step of rank1"], True  # so that nobody waits for other rollout jobs
    monkeypatch.setattr(train_group.ray, "wait", lambda refs, num_returns: did.extend(refs[:num_returns]))
    updates = train_group.Updates(side)
    monkeypatch.setattr(updates, "_within", lambda _: contextlib.nullcontext(did.append("the limit begins")))
    updates.run(lambda: did.append("connects"), lambda: did.append("pushes"))
    assert did == ["step of rank0", "step of rank1", "the limit begins", "connects", "pushes"]
