"""The driver of slime's rollout job, as far as it needs neither slime nor Ray: from where each rollout is generated.

`Slime` stands for slime's RolloutManager with its source of prompts, a row of numbers.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from slime.cross_job.adapter import data_source, rollout_driver
from slime.cross_job.errors import BadInput


class Slime:
    def __init__(self) -> None:
        self.at, self.drawn = 0, list[list[int]]()

    def generate(self) -> None:
        self.drawn.append([self.at, self.at + 1])
        self.at += 2


class Broker:
    """Stands for a Producer, and for what the broker knows of the source."""

    def __init__(self) -> None:
        self.ends: dict[int, int] = {}  # n-th generation -> where it ended
        self.turns: dict[int, int] = {}

    def consumer_facts(self) -> None:
        return None

    def source_before(self, rollout_id: int) -> tuple[int, int | None]:
        turn = self.turns.get(rollout_id, len(self.ends))
        return turn, self.ends.get(turn - 1)

    def publish_from(self, rollout_id: int, manager: Slime, /, *_: Any, **__: Any) -> Any:
        manager.generate()
        self.turns.setdefault(rollout_id, len(self.ends))
        self.ends[self.turns[rollout_id]] = manager.at
        return SimpleNamespace(version=1, num_samples=2, nbytes=1)


@pytest.fixture
def begin(monkeypatch):
    """begin(broker, manager): a rollout job of it."""
    monkeypatch.setattr(data_source, "state", lambda manager: manager.at)
    monkeypatch.setattr(data_source, "stands_at", lambda manager, state: manager.at == state)
    monkeypatch.setattr(data_source, "restore", lambda manager, state: setattr(manager, "at", state))
    monkeypatch.setattr(rollout_driver, "Tracking", lambda *_: SimpleNamespace(published=lambda rollout_id: None))
    monkeypatch.setattr(
        rollout_driver._Server, "_in_manager", lambda self, function, *args: function(self._manager, *args)
    )
    return lambda broker, manager: rollout_driver._Server(SimpleNamespace(job_id="exp"), broker, manager)


def test_a_new_rollout_job_goes_on_behind_what_was_published(begin):
    broker, first, second = Broker(), Slime(), Slime()
    for manager, rollout_ids in ((first, (0, 1)), (second, (2, 1, 3))):
        server = begin(broker, manager)
        for rollout_id in rollout_ids:
            server._generate(rollout_id)
    assert first.drawn == [[0, 1], [2, 3]]
    assert second.drawn == [[4, 5], [2, 3], [6, 7]], "rollout 1 is generated again from its prompts"


def test_prompts_that_somebody_draws_between_two_rollouts_end_the_job(begin):
    """As a worker of a fully asynchronous rollout function does, which draws while the last rollout is trained on."""
    broker, manager = Broker(), Slime()
    server = begin(broker, manager)
    server._generate(0)
    manager.at += 1
    with pytest.raises(BadInput, match="prompts were drawn since the last rollout was published"):
        server._generate(1)
    assert manager.drawn == [[0, 1]]


def test_a_checkpoint_that_the_train_job_loads_first_says_where_the_source_stands(begin):
    broker, manager = Broker(), Slime()
    server = begin(broker, manager)
    broker.ends[0] = 40  # as Consumer.resume says it
    server._generate(21)
    assert manager.drawn == [[40, 41]]


class Refusing(Broker):
    """The first generation holds what cannot be published."""

    def __init__(self, on_poison: str) -> None:
        super().__init__()
        self.on_poison, self.aside = on_poison, list[tuple[int, str]]()

    def publish_from(self, rollout_id: int, manager: Slime, /, *_: Any, **__: Any) -> Any:
        if not self.aside:
            manager.generate()
            raise BadInput("metadata['config'] is a Config")
        return super().publish_from(rollout_id, manager)

    def set_aside(self, rollout_id: int, reason: str) -> str:
        self.aside.append((rollout_id, reason))
        return self.on_poison


def test_what_cannot_be_published_is_generated_from_new_prompts(begin):
    broker, manager = Refusing("skip"), Slime()
    server = begin(broker, manager)
    for rollout_id in (0, 0, 1):  # what is set aside is demanded again
        server._generate(rollout_id)
    assert broker.aside == [(0, "metadata['config'] is a Config")]
    assert manager.drawn == [[0, 1], [2, 3], [4, 5]]


def test_what_cannot_be_published_ends_the_job_unless_it_is_to_be_skipped(begin):
    broker = Refusing("stop")
    with pytest.raises(BadInput, match="is a Config"):
        begin(broker, Slime())._generate(0)
    assert len(broker.aside) == 1
