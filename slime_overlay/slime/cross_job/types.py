"""The words of the protocol: names, limits, and the records that travel between clients, broker and vaults.

Plain data only: no Ray, no Arrow, so that the ledger and its tests need neither.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from .errors import BadInput

PROTOCOL = 1
"""Version of what clients, broker and vaults say to each other; all of one cluster must agree."""

DEFAULT_NAMESPACE = "slime_shared"
BROKER_NAME = "slime_cross_job_broker"
VAULT_NAME = "slime_cross_job_vault"

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_job_id(job_id: Any) -> str:
    """Return `job_id` if it can name an experiment, else raise BadInput."""
    if job_id is None or job_id == "":
        raise BadInput("no job id: pass --job-id NAME (or job_id=), the same name to the rollout and to the train job")
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise BadInput(
            f"job id {job_id!r} is not usable: 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return job_id


def check_rollout_id(rollout_id: Any) -> int:
    """Return `rollout_id` as an int if it is a whole number from 0 (numpy's integers too), else raise BadInput."""
    a_bool = isinstance(rollout_id, bool) or getattr(getattr(rollout_id, "dtype", None), "kind", "") == "b"
    if a_bool or not hasattr(rollout_id, "__index__"):
        raise BadInput(f"rollout id {rollout_id!r} is a {type(rollout_id).__name__}: it must be an int, 0 or greater")
    try:
        value = rollout_id.__index__()
    except TypeError:  # arrays and tensors have the method whatever they hold
        raise BadInput(f"rollout id {rollout_id!r} is no whole number: it must be an int, 0 or greater") from None
    if value < 0:
        raise BadInput(f"rollout id {value} is negative: ids count from 0")
    return value


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a producer or consumer says of itself when it attaches; shown in verdicts."""

    client_id: str
    job_id: str
    role: str  # "producer" | "consumer" | "writer" (of values only)
    group: str = ""  # consumers only
    ray_job_id: str = ""
    submission_id: str = ""
    actor_id: str = ""
    node_id: str = ""
    host: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Payload:
    """Where a published payload lies: `token` names it inside `vault`; `parts` objects of `nbytes` bytes in all."""

    token: str
    vault: str
    nbytes: int
    parts: int = 1
    num_samples: int = -1  # -1: an opaque value, not a batch
    weight_version: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Located:
    """A published version as a reader sees it."""

    job_id: str
    rollout_id: int
    version: int
    payload: Payload
    published_at: float  # wall clock, seconds
    epoch: int  # of the producer that published it


@dataclass(frozen=True, slots=True)
class LocatedValue:
    """The newest value of a key (weights, say) as a reader sees it."""

    job_id: str
    key: str
    version: int
    payload: Payload
    published_at: float
