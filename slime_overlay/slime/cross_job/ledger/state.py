"""What the ledger remembers: clients, groups, rollouts, jobs. Plain mutable records without behaviour of their own.

A rollout moves, for each consumer group:

    demanded ──► published ──► leased ──► acked ──► freed (when every open group has acked it and retention is past)
        ▲            ▲            │          │
        │            ├────────────┘          │ its consumer ended or gave it back
        │            └───────────────────────┘ the group resumed from an older checkpoint
        └── lost with its vault, or too stale: generated again when it is demanded
"""

from dataclasses import dataclass, field
from typing import Any

from ..settings import ABOUT
from ..types import ClientInfo, Ids, Located, LocatedValue, Payload
from .gate import Gate
from .tables import Table

LIVE, SILENT = "live", "silent"
FINISHED, STOPPED, FAILED, DEAD = "finished", "stopped", "failed", "dead"
"""States of a client: attached and heard; attached, and its lease is over: others may take its place or what it holds,
and it goes on if nobody did; through, nothing more to come; stopped as asked, to be started again; ended with an error
that it told; gone, or another took its place."""

RUNNING, PAUSED, DRAINING = "running", "paused", "draining"
"""What a job's operator wants: go on; generate nothing for now; finish what is out, and end."""

WAIT, DROP, REGENERATE = "wait", "drop", "regenerate"
"""What happens to rollouts whose weights are too old, see --cross-job-on-stale."""


STOP, SKIP = "stop", "skip"
"""What happens to a rollout that is set aside, see --cross-job-on-poison."""

ANSWERS = 16
"""Of each operation that are remembered for a client, whose threads may each ask again because an answer was lost; and
so many for the operators of a job."""

ACK, PUBLICATION = "ack", "publication"
"""When retention begins, see --cross-job-retain-from."""

WRITE_THROUGH, WRITE_BEHIND = "write-through", "write-behind"
"""What is published is in the durable store before anybody hears of it, or some time later."""


DEMANDED, GENERATING, PUBLISHED, CLAIMED = "demanded", "generating", "published", "claimed"
ACKED, FREED, LOST, DROPPED = "acked", "freed", "lost", "dropped"
STATES = (DEMANDED, GENERATING, PUBLISHED, CLAIMED, ACKED, FREED, LOST, DROPPED)
"""How far a rollout came, as the group that drives the producer sees it."""


@dataclass(slots=True)  # not frozen, which makes `replace` three times slower: nobody changes one all the same
class Progress:
    """How far a rollout came, and when (the broker's wall clock, seconds; 0: not yet). For people: the ledger decides
    nothing by it."""

    state: str
    seq: int  # counts what happened to rollouts of the job
    demanded: float = 0.0
    begun: float = 0.0  # handed to the producer
    made: float = 0.0  # all of it was there, by the clock of its vault
    published: float = 0.0
    claimed: float = 0.0
    acked: float = 0.0
    weight_version: int | None = None  # that generated it
    staleness: int | None = None  # weight versions that it was behind when it was claimed
    nbytes: int = 0
    num_samples: int = -1
    reward: float | None = None  # `reward` of its meta
    version: int = 0  # n-th that was published
    claims: int = 0
    losses: int = 0  # times that it went with its vault
    producer_waited_s: float = 0.0  # before it was begun
    consumer_waited_s: float = 0.0  # before it was claimed


@dataclass(frozen=True, slots=True)
class Event:
    """Something that an operator may want to know."""

    at: float  # wall clock, seconds
    kind: str  # one of progress.EVENTS
    text: str
    rollout_id: int = -1


@dataclass(slots=True)
class Client:
    """One incarnation of a producer or consumer."""

    info: ClientInfo
    epoch: int  # n-th incarnation in its role (of its group)
    dead_after_s: float  # its lease: silence after which others may take its place and what it holds
    attached_at: float  # wall clock
    last_beat: float  # monotonic
    activity: str = "attached"
    state: str = LIVE
    reason: str = ""
    ended_at: float = 0.0  # monotonic; of one that is silent: since when its lease is over
    stated: dict[str, Any] = field(default_factory=dict)  # the job's settings, as this client was given them
    terms: dict[str, Any] = field(default_factory=dict)  # what the other side must agree with, see Membership.attach
    facts: Any = None  # what it told its peer, see Ledger.announce
    answered: dict[str, dict[str, Any]] = field(default_factory=dict)  # operation -> its newest tokens -> answer
    claims: dict[int, str] = field(default_factory=dict)  # rollout id -> token of the claim that its lease answers
    since: float = 0.0  # monotonic: when it began with its activity
    columns: tuple[str, ...] = ()  # of every batch: that it publishes, or that it needs
    waited_s: float = 0.0  # since it last got a rollout
    attached_as: int = 0  # its epoch when it attached, which stands for its process and, of a producer, its engines
    training: int | None = None  # rollout that it trains on
    vouched_at: float | None = None  # monotonic: when Ray last called it alive, in its present silence
    waits_s: float = 0.0  # for how long it had only waited for others when it was last heard; 0: it was at work

    @property
    def live(self) -> bool:
        """Whether it is attached, and its lease holds."""
        return self.state == LIVE

    @property
    def attached(self) -> bool:
        """Whether it is attached, heard or not."""
        return self.state in (LIVE, SILENT)

    def answer(self, operation: str, token: str) -> Any:
        """What `operation` was answered with this token; None: it was not, or long ago."""
        known = self.answered.get(operation)
        return known.get(token) if isinstance(known, dict) else None  # older versions kept one answer

    def remember(self, operation: str, token: str, answer: Any) -> None:
        """Keep the answer, small as it should be: all of them are part of every snapshot."""
        known = self.answered.get(operation)
        kept = [*known.items()][-ANSWERS + 1 :] if isinstance(known, dict) else []
        self.answered[operation] = {**dict(kept), token: answer}


@dataclass(slots=True)
class Group:
    """Consumers that share the rollouts of a job among them: each rollout goes to one of them."""

    name: str
    epoch: int = 0
    woken: int = 0  # of those epochs, how many began with a member that was heard again
    last: Client | None = None  # the newest member
    ended: Client | None = None  # the member that ended last: how the group stands when none is left
    live: int = 0
    ready: list[int] = field(default_factory=list)  # heap; entries may be stale, see Ledger.claim
    leases: dict[int, tuple[str, int]] = field(default_factory=dict)  # rollout id -> (client id, version)
    acked: Ids = field(default_factory=Ids)  # of those that are not freed
    start: int = 0  # what lies below is covered by the checkpoint from which it resumed
    demanded: bool = False  # some member has demanded a rollout: this group drives the producer

    @property
    def closed(self) -> bool:
        """Its members are through and said so: it holds nothing back any more."""
        return self.live == 0 and self.ended is not None and self.ended.state == FINISHED


def _standard(name: str) -> Any:
    """What holds where no client has stated this setting."""
    return ABOUT[name]["standard"]


@dataclass(slots=True)
class Job:
    """One experiment."""

    job_id: str
    # settings, as some client stated them, see settings.py
    max_ahead: int = _standard("max_ahead")
    retain: int | None = _standard("retain")
    retain_s: float | None = _standard("retain_s")
    retain_bytes: int | None = _standard("retain_bytes")
    retain_from: str = _standard("retain_from")
    forget_after_s: float = _standard("forget_after_s")
    max_bytes: int | None = _standard("max_bytes")
    max_staleness: int | None = _standard("max_staleness")
    on_stale: str = _standard("on_stale")
    on_poison: str = _standard("on_poison")
    store: str | None = field(default=None, repr=False)  # URI of the durable store, with its password
    store_mode: str = _standard("store_mode")
    compression: str = _standard("compression")
    metrics: str = _standard("metrics")
    traces: str = _standard("traces")
    agreed: dict[str, str] = field(default_factory=dict)  # what its clients share, see Membership.agree
    mark: str = ""  # that the broker left in the durable store, see payloads.marked
    # who
    producer: Client | None = None
    producer_epoch: int = 0
    producer_woken: int = 0  # of those epochs, how many began with a producer that was heard again
    groups: dict[str, Group] = field(default_factory=dict)
    # what
    rollouts: dict[int, list[Located]] = field(default_factory=dict)  # id -> its versions, oldest first
    values: dict[str, LocatedValue] = field(default_factory=dict)
    lost_values: dict[str, LocatedValue] = field(default_factory=dict)  # went with their vault
    demands: set[int] = field(default_factory=set)  # demanded, not published
    # being generated -> newest weights when it was begun, and the number of resumptions until then
    handed: dict[int, tuple[int | None, int]] = field(default_factory=dict)
    last_demanded: int = -1
    ever: Ids = field(default_factory=Ids)  # every id that was published
    readable: Ids = field(default_factory=Ids)  # those in `rollouts`
    freed: Ids = field(default_factory=Ids)  # acked or skipped, and not to be had any more
    skipped: Ids = field(default_factory=Ids)  # too stale: no history has them
    early: int = -1  # the last that had to wait for newer weights
    lost: set[int] = field(default_factory=set)  # went with their vault
    again: dict[int, int] = field(default_factory=dict)  # published more than once, not freed: id -> its last version
    held_bytes: int = 0  # payloads of `rollouts` in the object store
    # acked by every open group, retained (some lost since), oldest first -> since when, by `aged_s`
    done: Table[float] = field(default_factory=Table)
    # where the producer's source of prompts stands: the n-th generation began where the one before it ended
    positions: Table[int] = field(default_factory=Table)  # rollout id -> n; forgotten when it is freed
    sources: Table[Payload] = field(default_factory=Table)  # n -> the payload that tells where it ended
    # serial -> what lies in the durable store, too: it is not lost with its vault, nor with the cluster
    records: "Table[Located | LocatedValue]" = field(default_factory=Table)
    frontier: int = -1  # n of the newest
    tells_source: bool = False  # its producer says where its source stands
    gap: bool = False  # the broker's last changes died with those that kept them: nobody knows where the source stands
    # what now
    # rollouts that ended their train jobs: how many in a row; and those that are set aside for it, or for what they
    # hold: {"reason", "at" (wall clock), "version", "weight_version", "nbytes", "replaced" (by one of new prompts),
    # "stuck" (so were those before, and it is not replaced, whatever `on_poison` says)}
    crashes: dict[int, int] = field(default_factory=dict)
    dead_letters: dict[int, dict[str, Any]] = field(default_factory=dict)
    refused: int = 0  # of these, how many since the last one that could be published
    control: str = RUNNING
    steered: dict[str, Any] = field(default_factory=dict)  # newest tokens of Operator.steer -> answer
    complete: bool = False
    gate: Gate = field(default_factory=Gate)
    # counters, for status and audits
    published: int = 0
    republished: int = 0
    claimed: int = 0
    acked: int = 0
    requeued: int = 0
    covered: int = 0  # acked by resuming from a checkpoint that covers them
    dropped: int = 0  # too stale, given up with their prompts
    regenerated: int = 0  # too stale, generated again from the same prompts
    delayed: int = 0  # would have been too stale, generated later
    losses: int = 0  # rollouts that went with a vault before they took effect
    resumed: int = 0  # times that a group went on from a checkpoint
    rewound: int = 0  # times that this took acks back
    serial: int = 0  # of what is published next, rollouts and values alike
    revision: int = 0  # how often it was kept, see replicas.py
    over: Ids = field(default_factory=Ids)  # serials of what was freed, replaced, given up or lost
    # for people, see history.py
    progress: Table[Progress] = field(default_factory=Table)  # of the newest rollouts; what changed last comes last
    events: Table[Event] = field(default_factory=Table)  # the newest, by number
    counts: dict[str, int] = field(default_factory=dict)  # events by kind, since the job began
    nbytes: dict[str, int] = field(default_factory=dict)  # bytes of what was published, claimed, acked, dropped
    waited: dict[str, float] = field(default_factory=dict)  # seconds, by history.WAITS
    verdicts: dict[str, int] = field(default_factory=dict)  # told to whoever waited, by history.VERDICTS
    seq: int = 0  # of Progress
    began: float = 0.0  # wall clock, seconds
    # age: seconds for which brokers have kept the job, by the monotonic clock of each, see History.age
    aged_s: float = 0.0
    aged_at: float | None = None  # monotonic: until when that counts; None: nobody has kept it since
    completed_s: float = 0.0  # its age when it was complete
    closed: bool = False  # its durable store has one last entry of it, and is not asked any more

    @property
    def weights_now(self) -> int | None:
        """Newest weight version that the job knows, also where it went with its vault; None: none yet."""
        weights = self.values.get("weights") or self.lost_values.get("weights")
        version = weights.version if weights else self.gate.version
        return version if type(version) is int else None  # an older version of this took what it was given


TABLES = ("done", "positions", "sources", "records", "progress", "events")
"""Fields of Job that grow; vaults are told only what changes in them."""

FOR_PEOPLE = ("progress", "events")
"""Those of them that are bounded, and that nothing hangs on."""


def is_full(job: Job) -> bool:
    """Whether the next rollout, as large as the last one, would exceed the bound on bytes."""
    unacked = [r for r in job.rollouts if r not in job.done]
    if job.max_bytes is None or not unacked:
        return False
    could_go = sum(in_memory(v.payload) for r in job.done for v in job.rollouts.get(r, []))
    return job.held_bytes + job.rollouts[max(unacked)][-1].payload.nbytes - could_go > job.max_bytes


def in_memory(payload: Payload) -> int:
    """Bytes of this payload in the object store."""
    return payload.nbytes if payload.vault else 0
