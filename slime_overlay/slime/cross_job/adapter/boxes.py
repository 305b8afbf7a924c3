"""slime's Box, cross-job: the reference to a published rollout, with its job id, rollout id and versions.

`inner` is a Ray ref as in slime's own Box, owned by a vault: `ray.get` resolves it (to a Batch) in any job, as long as
the rollout is retained. `process` is what slime's `process_rollout_data` hands over to: every rank reads its own rows
from shared memory of its node, through slime's own code.
"""

from collections.abc import Callable
from typing import Any

import ray

from ..client.session import get_parts
from ..errors import BadInput
from .dp_split import anew, with_globals
from .names import of_slime
from .training_data import open_rows, pack, unpack

Box: Any = of_slime("Box")


class CrossJobBox(Box):
    """One part of a published rollout."""

    def __init__(self, inner: Any, job_id: str, rollout_id: int, version: int, weight_version: int | None):
        super().__init__(inner)
        self.job_id, self.rollout_id = job_id, rollout_id
        self.version, self.weight_version = version, weight_version

    def __repr__(self) -> str:
        return f"<CrossJobBox {self.job_id} rollout {self.rollout_id} version {self.version}>"

    def process(self, read: Any, args: Any, dp_rank: int, dp_size: int) -> Any:
        """slime's `process_rollout_data` (up to v0.1), on every rank as if it were the one that reads and broadcasts.

        There the first rank gets the whole rollout and sends it to all others, pickled. Here each opens it in place
        and touches the rows that the same code then asks for.
        """
        batch = self.get()
        alone = _Alone(read.__globals__["dist"])
        mine = with_globals(read, ray=_Reader(lambda ref: open_rows(batch)), dist=alone)
        return mine(args, Box(self.inner), dp_rank, dp_size)

    def get(self) -> Any:
        """The batch, zero-copy on its node. Raises PayloadLost."""
        return get_parts([self.inner], f"rollout {self.rollout_id} of job {self.job_id}")[0]


class CrossJobBoxes(list[CrossJobBox]):
    """One box per DP rank, as slime hands them out from v0.3 on."""

    def process(self, read: Any, args: Any, dp_rank: int, dp_size: int) -> Any:
        """slime's `process_rollout_data`, reading this rank's part."""
        if len(self) != dp_size:
            raise BadInput(
                f"rollout {self[0].rollout_id} was split for {len(self)} training ranks, but the train job has "
                f"{dp_size}"
            )
        mine = with_globals(read, ray=_Reader(lambda ref: unpack(self[dp_rank].get())))
        return mine(args, [Box(box.inner) for box in self], dp_rank, dp_size)


def boxes_of(rollout: Any) -> CrossJobBoxes:
    """The boxes of a claimed rollout, one a part."""
    about = (rollout.job_id, rollout.rollout_id, rollout.version, rollout.weight_version)
    return CrossJobBoxes(CrossJobBox(ref, *about) for ref in rollout.refs)


def boxes_anew(rollout: Any, args: Any, config: dict[str, Any]) -> CrossJobBoxes:
    """The boxes of a claimed rollout that was split for another layout than this train job's (dp_split.py).

    Owned by this process: they end with the train job.
    """
    about = (rollout.job_id, rollout.rollout_id, rollout.version, rollout.weight_version)
    parts = anew([unpack(batch) for batch in rollout.parts], rollout.meta["split"], args, config)
    return CrossJobBoxes(CrossJobBox(ray.put(pack(part)), *about) for part in parts)


def boxes_apart(parts: list[Any], job_id: str, rollout_id: int) -> CrossJobBoxes:
    """Boxes of parts that are not published; this process owns them."""
    return CrossJobBoxes(CrossJobBox(ray.put(part), job_id, rollout_id, 0, None) for part in parts)


class _Reader:
    """Ray, for a function that is to read something else."""

    def __init__(self, get: Callable[[Any], Any]):
        self.get = get

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)


class _Alone:
    """torch.distributed, for a rank that reads for itself: it is the first rank, and broadcasts to nobody."""

    def __init__(self, dist: Any):
        self._dist = dist

    def get_rank(self) -> int:
        return 0

    def broadcast_object_list(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dist, name)
