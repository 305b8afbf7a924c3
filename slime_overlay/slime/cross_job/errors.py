"""Every error of slime cross-job, split by what the caller can do next.

    CrossJobError                 exit code 1
    ├── BadInput (ValueError)     2  the call is wrong: correct it and call again
    │   ├── BatchError               a value, column or buffer that is no batch
    │   └── ContentRefused           what was generated holds a value that cannot be published: named in words
    ├── Refused                   3  the broker says no: the message names who holds the place
    │   ├── JobIdTaken               a live job has this place under the job id already
    │   ├── Fenced                   this incarnation was replaced; a newer one took its place, or another broker
    │   ├── ProtocolMismatch         the broker was made by another protocol version
    │   ├── Poisoned                 a rollout is set aside: the message says why, and how to go on
    │   ├── StoreRefused             the durable store does not let us in, or write
    │   └── NotOwner                 the lease is not (or no longer) this consumer's
    ├── Unreachable               4  something that should answer does not
    │   ├── ClusterUnreachable       no Ray cluster at the address
    │   ├── NoBroker                 nobody has used cross-job in this namespace of the cluster
    │   ├── BrokerLost               the broker died and does not come back
    │   │   └── Forgotten            the broker is there, but nobody kept its memory of this client
    │   ├── PayloadLost              the vault that owned the payload is gone
    │   │   ├── PayloadDamaged       what the durable store has of it is not what was written: it is in quarantine
    │   │   └── ValueLost            and it was a value of this client's (weights, say): publish it again
    │   ├── ActorLost                the producer's actor died in its method; nothing of that call was published
    │   ├── StoreUnreachable         the durable store does not answer
    │   │   └── NotKept                  no vault keeps a change of the broker, for now: ask again
    │   ├── StoreFull             7  object store and disk, or the durable store, are full; nothing was published
    │   └── NoResources           8  no node has, or has free, what an actor or placement group needs; named in words
    ├── WaitTimeout (TimeoutError) 5 the deadline passed; `verdict` says who was waited for
    │   └── HeldBack              9  it passed while the job was paused, or full: `verdict` says which
    ├── NotStored (KeyError)      2  the durable store has no such key
    ├── RolloutNotFound (KeyError) 2 no such rollout or version, or it was freed already
    │   ├── JobNotFound              no such job in this namespace, hence no rollout of it
    │   ├── GroupNotFound            the job has no such consumer group
    │   └── RecordingNotFound        the store has no such recording
    ├── PeerFailed                6  the other job failed or died; `verdict` says how
    ├── WrongWeights              10  engines serve other weights than this job gave them; names both
    ├── MethodFailed                 a producer's method raised what no other process can take
    ├── EndOfStream               0  the other job finished: there is nothing more to come
    │   └── Drained                  all is drained, as its operator wanted; what is not acked is kept
    └── Stopped                   0  this job was asked to stop (SIGTERM)

The errors survive pickling, because Ray carries them between processes: each is rebuilt from its `args`.
"""


class CrossJobError(Exception):
    """Root of the tree. `exit_code` is what a job that ends with this error returns to its shell."""

    exit_code = 1

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class BadInput(CrossJobError, ValueError):
    """The call cannot be carried out as it was made; the message says which argument and what would do."""

    exit_code = 2


class BatchError(BadInput):
    """Columns that do not make a batch, or bytes that are not one; names the column and the sample."""


class ContentRefused(BadInput):
    """What was generated, or the state of its data source, holds a value that cannot be published; names the value.
    Generated again from the same prompts, it would be refused again."""


class Refused(CrossJobError):
    """The broker refuses; repeating the call does not help until what the message names has changed."""

    exit_code = 3


class JobIdTaken(Refused):
    """A live job holds this place under the job id; `silent_s` is how long it has not been heard."""

    def __init__(self, message: str, silent_s: float = 0.0):
        super().__init__(message, silent_s)
        self.silent_s = silent_s


class Fenced(Refused):
    """A newer incarnation took this one's place, or another broker keeps the job; this one must stop."""


class ProtocolMismatch(Refused):
    """Broker and client speak different protocol versions."""


class Poisoned(Refused):
    """A rollout is set aside, because it ended its train jobs, or cannot be published because of what it holds."""


class StoreRefused(Refused):
    """The durable store does not let us in, or does not let us write: access rights, a password, a read-only disk."""


class NotOwner(Refused):
    """The lease does not belong to this consumer, or it ended."""


class Unreachable(CrossJobError):
    """Something that should answer does not."""

    exit_code = 4


class ClusterUnreachable(Unreachable):
    """No Ray cluster answers at the address."""


class NoBroker(Unreachable):
    """The cluster answers, and this namespace of it has no broker: nobody has used cross-job there."""


class BrokerLost(Unreachable):
    """The broker does not answer."""


class Forgotten(BrokerLost):
    """The broker does not know this client: no vault that kept its memory is left."""


class PayloadLost(Unreachable):
    """The vault that owned a payload is gone, and the payload with it."""


class PayloadDamaged(PayloadLost):
    """What a durable store holds of a payload is not what was written; it is in quarantine, with the reason."""


class ValueLost(PayloadLost):
    """A value that this client published (weights, say) went with its vault: publish it again, others wait for it."""


class ActorLost(Unreachable):
    """The producer's actor died while its method ran; nothing of that call was published."""


class StoreUnreachable(Unreachable):
    """The durable store does not answer, or fails."""


class NotKept(StoreUnreachable):
    """No vault, and no durable store, keeps a change of the broker, for now: it is not answered. It may be asked
    again."""


class StoreFull(Unreachable):
    """No room for the payload in the object store and on its spill disk, or in the durable store; nothing of that call
    was published."""

    exit_code = 7


class NoResources(Unreachable):
    """An actor or a placement group was not started, because the cluster lacks, or has not free, what it needs."""

    exit_code = 8


class WaitTimeout(CrossJobError, TimeoutError):
    """A deadline passed. `verdict` (a dict) says who was waited for, its last sign of life and what it was doing."""

    exit_code = 5

    def __init__(self, message: str, verdict: dict | None = None):
        super().__init__(message, verdict)
        self.verdict = verdict or {}


class HeldBack(WaitTimeout):
    """A deadline passed while nothing could be generated: the job is paused, or its bound on bytes is reached."""

    exit_code = 9


class NotStored(CrossJobError, KeyError):
    """The durable store has no such key."""

    exit_code = 2


class RolloutNotFound(CrossJobError, KeyError):
    """No such rollout, version or value, or it was acked and freed."""

    exit_code = 2


class JobNotFound(RolloutNotFound):
    """This namespace has no such job; the message names those that it has."""


class GroupNotFound(RolloutNotFound):
    """The job has no such consumer group; the message names those that it has."""


class RecordingNotFound(RolloutNotFound):
    """The durable store has no recording of this name; the message names those that it has."""


class PeerFailed(CrossJobError):
    """The other job failed or died. `verdict` (a dict) holds who, when, its Ray job's status and its error."""

    exit_code = 6

    def __init__(self, message: str, verdict: dict | None = None):
        super().__init__(message, verdict)
        self.verdict = verdict or {}


class WrongWeights(CrossJobError):
    """The engines say that they serve other weights than this job gave them: the message names both, and what to do.
    Nothing is generated, and what was generated so is not published."""

    exit_code = 10


class MethodFailed(CrossJobError):
    """The method that a vault called raised an exception that cannot be carried here as it is; the message holds its
    text. Nothing of that call was published."""


class EndOfStream(CrossJobError):
    """The other job said that it is done: nothing more will be published, or nothing more is wanted."""

    exit_code = 0


class Drained(EndOfStream):
    """The job's operator drained it: nothing more is generated, and what is not acked is kept for the next start."""


class Stopped(CrossJobError):
    """This job was asked to stop (SIGTERM), and came to a point where it can."""

    exit_code = 0
