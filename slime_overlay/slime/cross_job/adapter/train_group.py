"""slime's RayTrainGroup in a train job: weights go into the engines when the rollout job lets them.

The training actors still send the weights themselves, straight to the engines. Added is: asking the broker before
and telling it after (gate.py), connecting to the engines of a new rollout job, and giving them weights at once,
because the trainer may be waiting for a rollout that they cannot generate without.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from ..client import shutdown
from ..client.connection import get
from ..deadline import Deadline
from ..errors import CrossJobError, NotOwner, PeerFailed, WaitTimeout, WrongWeights
from . import update_groups
from .train_driver import TrainDriver

logger = logging.getLogger(__name__)

_POLL_S = 10.0


def adopt(group: Any, side: TrainDriver, critic: Any = None) -> None:
    """Give slime's group objects the behaviour of this module; `critic`: that of PPO's critic, from v0.3 on."""
    updates = Updates(side)
    for one in [group] if critic is None else [group, critic]:
        base = type(one)
        bases = (_InParts if side.in_parts else _BufferEra, base)
        one.__class__ = type(f"CrossJob{base.__name__}", bases, {"__doc__": base.__doc__})
        one.cross_job = updates
    side.save = partial(_save_all, side.args, group, critic) if side.in_parts else group.async_save_model


def actor_trains(args: Any, rollout_id: int) -> bool:
    """Whether slime trains the actor on this rollout, not PPO's critic alone."""
    return not getattr(args, "use_critic", False) or rollout_id >= args.num_critic_only_steps


def _save_all(args: Any, group: Any, critic: Any, rollout_id: int) -> None:
    """As train.py saves after a rollout."""
    if actor_trains(args, rollout_id):
        group.save_model(rollout_id, force_sync=True)
    if critic is not None:
        critic.save_model(rollout_id, force_sync=True)


class Updates:
    """Weight updates of slime's training actors, and what they are at."""

    def __init__(self, side: TrainDriver):
        self.side = side
        self.connected = 0  # epoch of the rollout job whose engines got weights last
        self.saving = -1  # the checkpoint that was written last, or is being written
        self._watch: threading.Thread | None = None
        self._phase: tuple[str, int, float] | None = None  # what is done to a rollout now, since when
        self._said = 0  # how often the gateway was told whether this process is at work
        self._saying = threading.Lock()

    def phase(self, what: str, rollout_id: int) -> None:
        """What was done before is over by now; from here on `what` is done to a rollout (empty: nothing)."""
        with self._saying:
            self._turn_to(what, rollout_id)

    def _turn_to(self, what: str, rollout_id: int) -> None:
        before, now = self._phase, time.time()
        self._phase = (what, rollout_id, now) if what else None
        self._said += 1
        self.side.gateway.working.remote(self._said, bool(what))
        if before is not None:
            self.side.add_span(*before, now)

    def step(self, refs: list[Any]) -> None:
        """The ranks are in the step that these refs are of. With its end this process is at work no longer, also where
        no weight update follows (--update-weights-interval)."""
        self.side.steps = refs
        threading.Thread(target=self._end_of_step, args=(refs, self._phase), daemon=True).start()

    def _end_of_step(self, refs: list[Any], phase: tuple[str, int, float] | None) -> None:
        ray.wait(refs, num_returns=len(refs), fetch_local=False)
        with self._saying:
            if self._phase is phase and not self.side.ended:  # else what is done now has an end of its own
                self._turn_to("", 0)

    def run(self, connect: Callable[[], Any], push: Callable[[], Any]) -> None:
        """Update the weights of all engines of the rollout job that is alive; again if it dies in the middle.

        Raises:
            PeerFailed, EndOfStream, WaitTimeout: no rollout job is there, or none came back.
        """
        side = self.side
        side.resources.stop()  # all ranks have started
        with side.lock:
            self.phase("weights", max(side.trained, 0))
            while True:
                epoch = side.ask("begin_update", side.args.num_rollout, side.weight_version, wait=True)
                if side.steps:  # the ranks are in a step, which may take any time: the update comes after it
                    ray.wait(side.steps, num_returns=len(side.steps))
                try:
                    with self._within(side.settings.update_timeout_s):
                        if epoch != self.connected:
                            connect()
                        push()
                    side.ask("end_update", side.weight_version, epoch)
                except NotOwner as error:
                    logger.warning("job %s: %s", side.args.job_id, error)
                    continue
                except CrossJobError:
                    side.gateway.break_update.remote(epoch)  # or the engines would be held for good
                    raise
                except ray.exceptions.RayTaskError as error:
                    self._broken(epoch, error)
                except ray.exceptions.RayActorError as error:
                    if not side.ask("break_update", epoch):
                        raise
                    logger.warning("job %s: engines died in a weight update: %s", side.args.job_id, error)
                    continue
                self.connected = epoch
                break
            self.phase("", 0)
        if self._watch is None:
            self._watch = threading.Thread(target=self._serve, args=(connect, push), daemon=True)
            self._watch.start()

    @contextmanager
    def training(self, rollout_id: int) -> Iterator[None]:
        """Around the call that lets the ranks begin to train on this rollout; with a critic, those of both groups, one
        after the other. The broker hears of it meanwhile, and has noted it when this ends."""
        side, noted = self.side, None
        if rollout_id != side.trained:  # what one group has begun, the other ends
            shutdown.check()
            noted = side.send("training", rollout_id)
        side.trained = max(side.trained, rollout_id)
        self.phase("train", rollout_id)
        side.gateway.doing.remote(f"training on rollout {rollout_id}")
        yield
        if noted is not None:
            noted()

    @contextmanager
    def _within(self, timeout_s: float) -> Iterator[None]:
        """slime awaits an update without end: if ranks or engines hang in it, this process ends."""
        late = WaitTimeout(
            f"a weight update did not end within {timeout_s:g} s (--cross-job-update-timeout-s): training "
            "ranks or engines hang; look at their logs, and start the job again, from its last checkpoint"
        )
        timer = threading.Timer(timeout_s, self.side.die, [late])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _broken(self, epoch: int, error: ray.exceptions.RayTaskError) -> None:
        """A rank failed in the update, and the others may wait for it for ever: nothing can be tried again."""
        if self.side.ask("break_update", epoch):
            raise PeerFailed(
                "the rollout job ended in the middle of a weight update, in which the training ranks wait for each "
                f"other: start this train job again, from its last checkpoint ({_last_line(error)})"
            ) from None
        raise error

    def _serve(self, connect: Callable[[], Any], push: Callable[[], Any]) -> None:
        """Give weights to the engines of every rollout job that comes after the first."""
        side = self.side
        while True:
            try:
                waiting = get(
                    side.gateway.unloaded.remote(self.connected, _POLL_S), Deadline(_POLL_S + 60), "the gateway"
                )
                if waiting is None:
                    continue
                with side.lock:
                    if waiting > self.connected:
                        logger.info("job %s: a new rollout job has come: it gets the weights", side.args.job_id)
                        self.run(connect, push)
            except (PeerFailed, WrongWeights, ray.exceptions.RayTaskError) as error:
                if not side.ended:
                    side.die(error)
                return
            except (CrossJobError, ray.exceptions.RayError) as error:
                if side.ended:
                    return
                logger.warning("job %s: no weights for a new rollout job, for now: %s", side.args.job_id, error)
                time.sleep(_POLL_S)


class _BufferEra:
    """In front of RayTrainGroup up to v0.1: methods return refs, which train.py awaits."""

    cross_job: Updates

    def async_init_weight_update_connections(self, rollout: Any) -> list[Any]:
        refs = super().async_init_weight_update_connections(rollout)  # type: ignore[misc]
        self.cross_job.connected = rollout.engines_epoch
        return refs

    def async_train(self, rollout_id: int, *args: Any, **kwargs: Any) -> list[Any]:
        with self.cross_job.side.lock:
            with self.cross_job.training(rollout_id):
                refs = super().async_train(rollout_id, *args, **kwargs)  # type: ignore[misc]
            self.cross_job.step(refs)
        return refs

    def async_save_model(self, step_id: int) -> list[Any]:
        with self.cross_job.side.lock:
            self.cross_job.phase("save", step_id)
            refs = super().async_save_model(step_id)  # type: ignore[misc]
        ray.get(refs)
        self.cross_job.phase("", 0)
        self.cross_job.side.saved = step_id
        self.cross_job.side.ask("saved", step_id)
        return refs

    def async_update_weights(self) -> list[Any]:
        """Blocks until the engines have the weights; train.py awaits the empty list that is returned."""
        update = super().async_update_weights  # type: ignore[misc]
        self.cross_job.run(
            lambda: ray.get(self.async_init_weight_update_connections(self.rollout)),  # type: ignore[attr-defined]
            lambda: ray.get(update()),
        )
        return []


class _InParts:
    """In front of RayTrainGroup from v0.3 on: methods block; engines are asked for at every update."""

    cross_job: Updates

    def async_train(self, rollout_id: int, *args: Any, **kwargs: Any) -> list[Any]:
        with self.cross_job.side.lock:
            with self.cross_job.training(rollout_id):
                refs = super().async_train(rollout_id, *args, **kwargs)  # type: ignore[misc]
            self.cross_job.step(refs)
        return refs

    def save_model(self, rollout_id: int, force_sync: bool = False) -> Any:
        with self.cross_job.side.lock:
            self.cross_job.phase("save", rollout_id)
            saved = super().save_model(rollout_id, force_sync=force_sync)  # type: ignore[misc]
            self.cross_job.phase("", 0)
        args = self.cross_job.side.args
        if getattr(args, "use_critic", False) and self.role != "critic":  # type: ignore[attr-defined]
            return saved  # the critic's checkpoint belongs to it, and is written next
        # an asynchronous checkpoint is known to be there once the next one begins
        covered = self.cross_job.saving if getattr(args, "async_save", False) and not force_sync else rollout_id
        self.cross_job.saving = self.cross_job.side.saved = rollout_id
        self.cross_job.side.ask("saved", covered)
        return saved

    def update_weights(self) -> None:
        self.cross_job.run(self._forget_dead_engines, self._push)

    def _push(self) -> None:
        if self._full_disk_weight_update_enabled():  # type: ignore[attr-defined]
            newest = self.cross_job.side.ask("newest_update")
            if newest > self._disk_weight_version:  # type: ignore[has-type]
                actors = self._actor_handlers  # type: ignore[attr-defined]
                ray.get([actor.__ray_call__.remote(update_groups.count_from, newest) for actor in actors])
                self._disk_weight_version = newest
        super().update_weights()  # type: ignore[misc]

    def _forget_dead_engines(self) -> None:
        actors = self._actor_handlers  # type: ignore[attr-defined]
        ray.get([actor.__ray_call__.remote(update_groups.forget) for actor in actors])


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
