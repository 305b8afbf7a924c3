"""The driver of the train job: slime's own train.py runs here; this makes the gateway and says how the job ended."""

import atexit
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..client import shutdown
from ..client.cluster_watch import ClusterWatch
from ..client.connection import START_S, ensure_ray, get
from ..client.jobs import log_to_stderr, tell
from ..client.placement import Watch
from ..deadline import Deadline
from ..errors import BadInput, CrossJobError, Drained, Stopped, WaitTimeout
from . import arguments
from .gateway import Gateway
from .tracking import share_run

logger = logging.getLogger(__name__)

_QUICK_S = 120.0  # least deadline of a call that waits for nobody
_SPAN_S = 5.0  # for the gateway to take a span
_NODE_DIED = "its node has died"  # as Ray says it of an actor


class TrainDriver:
    """One a process. `lock` is held while calls are sent to all training ranks, so that each gets them in order."""

    _instance: ClassVar["TrainDriver | None"] = None

    def __init__(self, args: Any):
        self.args = args
        self.settings = arguments.settings(args)
        self.lock = threading.RLock()
        self.trained = -1  # highest rollout that was given to the training ranks
        self.steps: list[Any] = []  # refs of what they make of it
        self.saved = -1  # newest checkpoint
        self.save: Callable[[int], None] | None = None  # of the group that trains, once there is one
        self.ended = True  # until the broker knows it
        from slime.ray import placement_group

        self.in_parts = hasattr(placement_group, "create_training_models")  # from v0.3 on
        log_to_stderr()
        ensure_ray(log_to_driver=True)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Gateway)
        options = {"num_cpus": 0, "max_concurrency": 64, "scheduling_strategy": here}
        self.gateway = actor.options(**options).remote(args, self.in_parts)
        sys.excepthook = self._excepthook
        gcs_survives = self.ask("start")  # the handshake, before anything is placed
        share_run(args, lambda name, value: str(self.ask("agree", name, value)))
        self.ended = False
        if said := arguments.staleness_adds_up(sys.argv[0], self.ask("max_ahead")):
            logger.warning("job %s: %s", args.job_id, said)
        shutdown.want(lambda: self.gateway.stop_waiting.remote())
        shutdown.install()
        self._watch_cluster(gcs_survives)
        atexit.register(self._at_exit)
        self.resources = Watch(self.settings, lambda text: self.gateway.doing.remote(text), self.die)

    @classmethod
    def of(cls, args: Any) -> "TrainDriver":
        """The train side of this process, made by the first call, with the arguments that slime completes later."""
        if cls._instance is None:
            cls._instance = cls(args)
        return cls._instance

    def add_span(self, what: str, rollout_id: int, began: float, ended: float) -> None:
        """See Session.add_span. Returns once the gateway has it: that is a threaded actor, and may take up what slime
        asks of it next, its end for one, before what it was told just before."""
        if self.settings.traces == "on":
            ray.wait([self.gateway.add_span.remote(what, rollout_id, began, ended)], timeout=_SPAN_S)

    def manager(self) -> Any:
        """What slime's create_rollout_manager returns at this pin."""
        if not self.in_parts:
            return Manager(self)
        per_epoch = None
        if self.args.num_rollout is None:
            per_epoch = self.ask("get_num_rollout_per_epoch", wait=True)
            self.args.num_rollout = per_epoch * self.args.num_epoch
        return self.gateway, per_epoch

    def ask(self, method: str, *args: Any, wait: bool = False) -> Any:
        """Call the gateway; `wait`: it may wait for the rollout job, which may be at work for any time, and it says
        itself when that is silent. It waits for a silent broker or vault as long as it may, and its error says which:
        it is given a little more."""
        return self.send(method, *args, wait=wait)()

    def send(self, method: str, *args: Any, wait: bool = False) -> Callable[[], Any]:
        """`ask` in two: the gateway is at it from here on, and what is returned waits for its answer."""
        deadline = Deadline(math.inf if wait else max(_QUICK_S, self.settings.timeout_s + START_S))
        ref = getattr(self.gateway, method).remote(*args)
        return lambda: get(ref, deadline, "the gateway")

    @property
    def weight_version(self) -> int:
        """Number of the weights that the training ranks have: the rollout that is to be trained on next."""
        return self.trained + 1 if self.trained >= 0 else self.args.start_rollout_id or 0

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(_cause(error), CrossJobError):
            self.die(error)
        sys.__excepthook__(kind, error, trace)
        self._end(traceback.format_exception_only(kind, error)[-1].strip(), through=self._last_step_is_safe())

    def die(self, error: BaseException) -> None:
        """End this process with an error, from any thread: one line, and the exit code that tells errors apart."""
        cause = _cause(error)
        if isinstance(cause, (Drained, Stopped)):
            self._stop(str(cause))
        tell(cause)
        self._end(str(cause), through=self._last_step_is_safe())
        sys.stdout.flush()
        ray.shutdown()
        os._exit(getattr(cause, "exit_code", 1))

    def _stop(self, reason: str) -> None:
        """End as asked: with a checkpoint of what was trained, where checkpoints are made at all."""
        if self.save is not None and self.args.save is not None and self.trained > self.saved:
            logger.info("job %s: saving after rollout %d, then stopping", self.args.job_id, self.trained)
            self.save(self.trained)
            if getattr(self.args, "rollout_global_dataset", False):  # as train.py does beside a checkpoint
                try:
                    get(self.gateway.save_and_stop.remote(self.trained), Deadline(10), "the rollout job's data source")
                except CrossJobError as other:
                    logger.warning("the data source's state was not saved beside the checkpoint: %s", other)
        self.ended = True
        get(self.gateway.stop.remote(reason), Deadline(30), "the gateway")

    def _watch_cluster(self, gcs_survives: bool | None) -> None:
        """End this process with its cluster: the gateway, which notices it as well, is another one."""
        gcs = ray.get_runtime_context().gcs_address
        ClusterWatch(gcs, gcs_survives, threading.Event(), lambda error: not self.ended).start()

    def _at_exit(self) -> None:
        self._end("its driver ended before the last rollout")

    def _error_of_the_step(self) -> Exception | None:
        """What the last training step ended with; WaitTimeout: it goes on."""
        try:
            get(self.steps, Deadline(1), "the training ranks")
        except (CrossJobError, ray.exceptions.RayError) as error:
            return error
        return None

    def _failed_in_a_step(self) -> bool:
        """Whether a training step failed, and not with a node: a lost node says nothing of the rollout, nor does what
        ends this process while the step goes on."""
        error = self._error_of_the_step()
        return error is not None and not isinstance(error, WaitTimeout) and _NODE_DIED not in str(error)

    def _last_step_is_safe(self) -> bool:
        """Whether what was trained on last is, and is in a checkpoint, if there are any: for a script that fails."""
        if self._error_of_the_step() is not None:
            return False
        saves = self.args.save is not None and self.args.save_interval is not None
        return not saves or self.saved >= self.trained

    def _end(self, reason: str, through: bool = True) -> None:
        """Tell the rollout job. After the last rollout nothing more is wanted, even if slime's script then fails
        (train_async.py does, up to v0.1)."""
        if self.ended or not ray.is_initialized():
            return
        self.ended = True
        number = self.args.num_rollout
        through = through and number is not None and self.weight_version >= number
        try:
            get(
                self.gateway.finish.remote()
                if through
                else self.gateway.fail.remote(reason, self._failed_in_a_step()),
                Deadline(self.settings.timeout_s + START_S if through else START_S),  # as Session._end
                "the gateway",
            )
        except (CrossJobError, ray.exceptions.RayError) as other:
            logger.warning("could not tell the broker how this job ended: %s", other)


def _cause(error: BaseException) -> BaseException:
    """The error that was raised, freed from Ray's wrapping."""
    return getattr(error, "cause", None) or error


class Manager:
    """In the place of slime's RolloutManager up to v0.1: the gateway behind the attributes that train.py uses."""

    def __init__(self, side: TrainDriver):
        self._side = side
        self.data_buffer = self.controller = side.gateway
        self.engines_epoch = 0

    @property
    def rollout_engines(self) -> list[Any]:
        """Engines of the rollout job that is alive; waits for one."""
        self.engines_epoch, engines, self.rollout_engine_lock = self._side.ask("engines", wait=True)
        return engines

    def async_generate(self, rollout_id: int, evaluation: bool = False) -> Any:
        return self.data_buffer.generate.remote(rollout_id, evaluation=evaluation)

    def async_eval(self, rollout_id: int) -> Any:
        return self.data_buffer.eval.remote(rollout_id)

    def async_offload(self) -> list[Any]:
        raise BadInput("engines of another job are not offloaded: rollout and training share no GPU across jobs")

    async_onload = async_offload
