"""The ledger holds its parts, and answers for them; its own is only what happens when a client ends."""

import time
from collections.abc import Callable
from typing import Any

from .garbage import Garbage
from .history import History
from .leases import Leases
from .lifetime import Lifetime
from .membership import Membership
from .operations import declared_by
from .operator import Operator
from .pacing import Pacing
from .prompts import Prompts
from .registry import Registry
from .retention import Retention
from .rollouts import Rollouts
from .state import FAILED, Client, Job
from .views import Views
from .weight_gate import WeightGate


class Ledger:
    """State of every job of one namespace. See the package.

    An operation (`operations`: name -> method, as the parts declare them) is an attribute of the ledger, too.

    Args:
        clock: monotonic seconds. wall: wall-clock seconds, for people.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self.registry = registry = Registry(clock, wall)
        self.garbage = garbage = Garbage()
        self.history = history = History(registry)
        self.prompts = prompts = Prompts(registry, garbage)
        self.retention = retention = Retention(registry, history, prompts, garbage)
        self.membership = membership = Membership(registry, history, retention, on_end=self._ended)
        self.rollouts = rollouts = Rollouts(registry, history, prompts, retention, garbage)
        self.pacing = pacing = Pacing(registry, history, prompts, retention, membership, rollouts)
        self.weight_gate = WeightGate(registry, membership, pacing)
        self.lifetime = lifetime = Lifetime(registry, history, retention)
        self.leases = leases = Leases(*(registry, history, prompts, retention, membership, rollouts, pacing, lifetime))
        self.operator = Operator(registry, history, membership, rollouts, pacing, leases, lifetime)
        self.views = Views(registry, history, rollouts, pacing)
        self.operations = declared_by(
            *(self.history, self.prompts, self.membership, self.rollouts, self.pacing),
            *(self.weight_gate, self.lifetime, self.leases, self.operator, self.views),
        )

    @property
    def jobs(self) -> dict[str, Job]:
        """Every job, by its id."""
        return self.registry.jobs

    @property
    def clients(self) -> dict[str, Client]:
        """Every client that is known, by its id: those that ended long ago are not."""
        return self.registry.clients

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name != "operations" and name in self.operations:
            return self.operations[name]
        raise AttributeError(f"the ledger has no operation {name!r}")

    def _ended(self, job: Job, client: Client, crashed: bool) -> None:
        self.leases.ended(job, client)
        if (crashed or client.state == FAILED) and client.training is not None:
            self.pacing.crashed_in(job, client.training, client.reason)
