"""Record a running job's rollouts, and serve them again to a train job that has no rollout job.

Recording: one more consumer group of the job, which gets every rollout, keeps it (recording.py), and acks it then. It
drives nothing, and the training waits for it only as for any group: nothing is freed that it has not kept.

Serving: a producer without engines that answers demands with the recorded bytes, under the terms on which the
recorded job ran. To slime's train job it looks like a rollout job with no engines: whatever is asked of those, nothing
happens. A demand for what is not recorded ends the stream where the recording ends, and is an error elsewhere.
"""

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import ray

from ..client.consumer import Consumer
from ..client.producer import Producer
from ..errors import BadInput, EndOfStream, PayloadLost, Refused, RolloutNotFound, WaitTimeout
from ..ledger.verdicts import patience_left_s
from ..settings import Settings
from ..storage import Store
from ..storage.recording import RECORDED, Header, Recording
from ..types import ids_text
from .handshake import OF_THE_DATA, PIN, of_a_recording

logger = logging.getLogger(__name__)

NUM_ROLLOUT = "--num-rollout"
_LOOK_S = 2.0  # between looks for newer versions


def record(job_id: str, store: Store, name: str, settings: Settings, compression: str = "none") -> Recording:
    """Keep every rollout of a job until its stream ends; goes on where an earlier recorder of this name stopped.

    Raises:
        PeerFailed: the rollout job failed, and did not come back within `peer_grace_s`. Stopped. WaitTimeout.
        BadInput: see Recording.make and keep. StoreFull, StoreRefused, StoreUnreachable.
        Refused: the job runs on other terms than those of what is recorded.
    """
    recording = Recording.make(store, name, Header(job_id, RECORDED), compression)  # before a group waits for it
    if recording.rollouts():
        logger.info("recording %s: has %s already", name, ids_text(recording.ids))
        recording.end("")
    with Consumer(job_id, f"recording:{name}", settings=settings) as consumer:
        logger.info("recording %s: keeping what job %s publishes", name, job_id)
        _Recorder(consumer, recording).run()
    return recording


class _Recorder:
    """Writes what a consumer gets."""

    def __init__(self, consumer: Consumer, recording: Recording):
        self._consumer, self.recording = consumer, recording

    def run(self) -> None:
        waited_s = 0.0
        while True:
            try:
                rollout = self._consumer.claim(timeout_s=_LOOK_S)
            except WaitTimeout as waited:
                waited_s += _LOOK_S
                limits = self._consumer.settings
                if waited_s >= limits.timeout_s and (
                    patience_left_s(waited.verdict, limits.timeout_s, limits.peer_grace_s) <= 0
                ):
                    raise
                self._keep_newer_versions()
                continue
            except EndOfStream as end:
                self._keep_newer_versions()
                self.recording.end(str(end))
                logger.info("recording %s: complete, %s: %s", self.recording.name, ids_text(self.recording.ids), end)
                return
            waited_s = 0.0
            self._keep(rollout)
            rollout.ack()
            self._keep_newer_versions()

    def _keep_newer_versions(self) -> None:
        """What was published once more since, which its group does not get again."""
        for located in self._consumer.catalog():
            version = (located.rollout_id, located.version)
            if located.rollout_id in self.recording.ids and not self.recording.has(*version):
                try:
                    self._keep(self._consumer.get(*version))
                except (RolloutNotFound, PayloadLost) as error:  # freed a moment ago
                    logger.warning("recording %s: %s", self.recording.name, error)

    def _keep(self, rollout: Any) -> None:
        self._agree_on_terms()
        kept = self.recording.keep(
            rollout.rollout_id,
            rollout.parts,
            version=rollout.version,
            weight_version=rollout.weight_version,
            meta=rollout.meta,
        )
        logger.info(
            "recording %s: rollout %d version %d %s: %d samples, %d bytes",
            *(self.recording.name, rollout.rollout_id, rollout.version, "kept" if kept else "already there"),
            *(rollout.num_samples, rollout.nbytes),
        )

    def _agree_on_terms(self) -> None:
        """What is recorded belongs together: one pin, one tokenizer."""
        told = (self._consumer.status()["producer"] or {}).get("terms") or {}
        before = self.recording.terms
        both = [name for name in OF_THE_DATA if name in told and name in before]
        if differ := [
            f"{name} was {before[name]!r}, and is {told[name]!r}" for name in both if told[name] != before[name]
        ]:
            raise Refused(
                f"recording {self.recording.name!r} holds rollouts of other terms than those of job "
                f"{self._consumer.job_id} now: {'; '.join(differ)}. Choose another --recording"
            )
        if told and told != before:
            self.recording.set_terms(told)


def terms_of(recording: Recording, num_rollout: int | None = None, free: tuple[str, ...] = ()) -> dict[str, Any]:
    """The terms on which a recording is served: those of the recorded run, as far as they matter without engines.

    Args:
        num_rollout: of the train job, where it differs from that of the run.
        free: names of terms that do not hold: the train job may have other values.

    Raises:
        BadInput: `free` names none of the terms.
    """
    terms = of_a_recording(recording.terms)
    for name in free:
        if name not in recording.terms:
            known = ", ".join(sorted(terms)) or "none"
            raise BadInput(f"{name!r} is no term of recording {recording.name!r}; its terms are: {known}")
        terms.pop(name, None)
    if num_rollout is not None:
        terms[NUM_ROLLOUT] = num_rollout
    return terms


def serve(job_id: str, recording: Recording, settings: Settings, terms: Mapping[str, Any]) -> int:
    """Answer the demands of a train job with recorded rollouts, until it is through; how many it got.

    Args:
        terms: that the train job must agree with, see terms_of.

    Raises:
        RolloutNotFound: it demanded one that is not recorded, though later ones are.
        PayloadDamaged, NotStored: a recorded rollout cannot be read.
        PeerFailed: the train job failed, and did not come back within `peer_grace_s`. Stopped. WaitTimeout.
    """
    ids = recording.ids
    if not len(ids):
        raise RolloutNotFound(f"recording {recording.name!r} has no rollouts to serve")
    # a train job of slime loads weights into engines after its last rollout, too; other streams end with the recording
    of_slime = PIN in recording.terms or NUM_ROLLOUT in terms
    until = terms.get(NUM_ROLLOUT) if of_slime else ids.last() + 1
    lasting = [name for name in OF_THE_DATA if name in terms]
    who = {"settings": settings, "terms": dict(terms), "lasting": lasting, "of_slime": of_slime}
    with Producer(job_id, **who) as producer:
        if of_slime:
            engines: Any = ray.remote(NoEngines)
            stand_in = engines.options(num_cpus=0).remote()
            producer.announce({"manager": stand_in, "engines": [], "lock": stand_in})
        logger.info("job %s: serving %s of recording %s", job_id, ids_text(ids), recording.name)
        served = _answer(producer, recording, {"until": until, "gated": of_slime})
        producer.finish(f"recording {recording.name!r} ends with rollout {ids.last()}")
        return served


def _answer(producer: Producer, recording: Recording, limits: dict[str, Any]) -> int:
    served = 0
    while (rollout_id := producer.patient_demand(**limits)) is not None:
        if rollout_id > recording.ids.last():
            logger.warning(
                "job %s: rollout %d is demanded, and is not recorded: the stream ends", producer.job_id, rollout_id
            )
            return served
        entry = recording.find(rollout_id)
        parts = recording.load(entry)
        published = producer.publish(rollout_id, parts, meta=entry.meta, weight_version=entry.weight_version)
        served += 1
        logger.info(
            "job %s: rollout %d version %d served: %d samples, %d bytes",
            *(producer.job_id, rollout_id, entry.version, published.num_samples, published.nbytes),
        )
    return served


class NoEngines:
    """An actor in the place of slime's rollout manager, where rollouts come from a recording: it has no engines, a
    source of prompts that stands nowhere, and a lock on the engines that nobody holds."""

    def __init__(self) -> None:
        self.data_source = SimpleNamespace(metadata={})
        self.buffer: list[Any] = []

    def get_updatable_engines_and_lock(self) -> tuple[Any, ...]:
        return [], None, 0, [], [], []

    def get_num_rollout_per_epoch(self) -> int:
        raise BadInput("a recording does not say how long an epoch is: give the train job --num-rollout")

    def check_weights(self, *args: Any, **kwargs: Any) -> list[Any]:
        return []

    def get_metadata(self) -> dict[str, Any]:
        return {}

    def get_buffer_length(self) -> int:
        return 0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to do."""

    generate = eval = save = load = release = set_train_parallel_config = clear_updatable_num_new_engines = _nothing
    recover_updatable_engines = health_monitoring_pause = health_monitoring_resume = update_metadata = _nothing
