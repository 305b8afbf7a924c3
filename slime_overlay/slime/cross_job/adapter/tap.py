"""A tap on an ordinary single job: it publishes what it generates for other Ray jobs, and trains as before."""

import logging
from typing import Any

from ..batch import Batch
from ..client.consumer import Consumer
from ..client.producer import Producer
from ..errors import Fenced, Refused, RolloutNotFound
from ..settings import Settings
from .boxes import boxes_apart, boxes_of

logger = logging.getLogger(__name__)


class Tap:
    """Producer, and consumer on behalf of the job's own training, in the process that generates.

    The job's own claim on a rollout ends when the second rollout after it is generated (slime trains on one while it
    generates the next, at most); other consumer groups keep what they have not acked.
    """

    def __init__(self, job_id: str, settings: Settings, num_rollout: int | None):
        self._num_rollout = num_rollout
        self._producer = Producer(job_id, settings=settings)
        self._own = Consumer(job_id, settings=settings)
        self._claimed: list[int] = []

    def publish(self, rollout_id: int, parts: list[Batch], meta: dict[str, Any], in_parts: bool) -> Any:
        """Publish the parts; returns slime's box, or a list of them where slime splits by rank."""
        self._ack_up_to(rollout_id - 2)
        try:
            self._producer.publish(rollout_id, parts, meta=meta)
            rollout = self._own.claim(rollout_id)
            self._claimed.append(rollout_id)
            boxes = boxes_of(rollout)
        except (Refused, RolloutNotFound) as error:
            if isinstance(error, Fenced):
                raise
            # it goes on from an older checkpoint than its readers: they have had this one
            logger.warning("rollout %d is trained on, but not published again: %s", rollout_id, error)
            boxes = boxes_apart(parts, self._producer.job_id, rollout_id)
        if self._num_rollout is not None and rollout_id + 1 >= self._num_rollout:
            self._ack_up_to(rollout_id)  # boxes hold what they need
            self._producer.finish()  # readers learn that this was the end, and no crash
            self._own.finish()
        return boxes if in_parts else boxes[0]

    def _ack_up_to(self, rollout_id: int) -> None:
        for done in [r for r in self._claimed if r <= rollout_id]:
            self._own.ack(done)
            self._claimed.remove(done)
