"""What the ledger remembers: clients, groups, rollouts, jobs. Plain mutable records without behaviour of their own.

A rollout moves, for each consumer group:

    demanded ──► published ──► leased ──► acked ──► freed (when every open group has acked it and retention is past)
                     ▲            │
                     └────────────┘ its consumer ended or gave it back
"""

from dataclasses import dataclass, field
from typing import Any

from .gate import Gate
from .types import ClientInfo, Located, LocatedValue

LIVE, FINISHED, FAILED, DEAD = "live", "finished", "failed", "dead"
"""States of a client: attached; ended as planned; ended with an error that it told; gone without a word."""


@dataclass(slots=True)
class Client:
    """One incarnation of a producer or consumer."""

    info: ClientInfo
    epoch: int  # n-th incarnation in its role (of its group)
    dead_after_s: float
    attached_at: float  # wall clock
    last_beat: float  # monotonic
    last_beat_wall: float
    activity: str = "attached"
    state: str = LIVE
    reason: str = ""
    ended_at: float = 0.0  # monotonic
    stated: dict[str, int] = field(default_factory=dict)  # the job's settings, as this client was given them
    facts: Any = None  # what it told its peer, see Ledger.announce
    answered: dict[str, tuple[str, Any]] = field(default_factory=dict)  # operation -> its newest token and answer

    @property
    def live(self) -> bool:
        return self.state == LIVE


@dataclass(slots=True)
class Group:
    """Consumers that share the rollouts of a job among them: each rollout goes to one of them."""

    name: str
    epoch: int = 0
    last: Client | None = None  # the newest member
    ended: Client | None = None  # the member that ended last: how the group stands when none is left
    live: int = 0
    ready: list[int] = field(default_factory=list)  # heap; entries may be stale, see Ledger.claim
    leases: dict[int, tuple[str, int]] = field(default_factory=dict)  # rollout id -> (client id, version)
    acked: set[int] = field(default_factory=set)
    demanded: bool = False  # some member has demanded a rollout: this group drives the producer

    @property
    def closed(self) -> bool:
        """Its members are through and said so: it holds nothing back any more."""
        return self.live == 0 and self.ended is not None and self.ended.state == FINISHED


@dataclass(slots=True)
class Job:
    """One experiment."""

    job_id: str
    max_ahead: int = 0
    retain: int = 0
    producer: Client | None = None
    producer_epoch: int = 0
    groups: dict[str, Group] = field(default_factory=dict)
    rollouts: dict[int, list[Located]] = field(default_factory=dict)  # id -> its versions, oldest first
    values: dict[str, LocatedValue] = field(default_factory=dict)
    demands: set[int] = field(default_factory=set)  # demanded, not yet published
    last_demanded: int = -1
    last_published: int = -1
    freed: set[int] = field(default_factory=set)
    done: dict[int, None] = field(
        default_factory=dict
    )  # ordered set: acked by every open group, still retained; oldest first
    complete: bool = False
    gate: Gate = field(default_factory=Gate)
    newest: tuple[int, dict[str, Any]] | None = None  # highest rollout id that was published, and its metadata
    # counters, for status and audits
    published: int = 0
    republished: int = 0
    claimed: int = 0
    acked: int = 0
    requeued: int = 0
