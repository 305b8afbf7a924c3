"""The driver of the rollout job: slime's own engines, router and data source generate what the train job demands."""

import contextlib
import ctypes
import logging
import math
import os
import signal
from typing import Any

import ray

from ..client import shutdown
from ..client.connection import ensure_ray, get
from ..client.jobs import tell
from ..client.placement import Watch
from ..client.producer import Producer
from ..deadline import Deadline
from ..errors import ActorLost, BadInput, CrossJobError, Stopped, Unreachable, WrongWeights
from ..ledger.state import SKIP
from . import arguments, data_source, engine_weights
from .handshake import OF_THE_DATA, differences, others, terms, warn_of
from .names import of_slime
from .tracking import Tracking, share_run

logger = logging.getLogger(__name__)

_QUICK_S = 300.0  # deadline of a call to slime's manager that is idle by then
_AT_WORK = Deadline(math.inf)
"""Of calls to slime's manager, which answers one after the other: it may be loading models or data, evaluating or
generating, for any time. Ray says when it dies."""
_ATTEMPTS = 3  # at one rollout, while vaults die


def main(args: Any) -> None:
    """Run the rollout job with slime's parsed arguments, until the train job is through.

    Raises:
        CrossJobError: see errors.py; each has an exit code.
    """
    if getattr(args, "cross_job_role", None) != "rollout":
        raise BadInput(
            "this is the rollout job's entry: add --enable-cross-job-communication --cross-job-role rollout"
        )
    ensure_ray(log_to_driver=True)
    _children_die_with_us()
    shutdown.want()
    stated = terms(args, _in_parts())
    with Producer(
        args.job_id, settings=arguments.settings(args), terms=stated, lasting=OF_THE_DATA, of_slime=True
    ) as producer:
        share_run(args, producer.agree)
        producer.doing("starting slime's engines")
        resources = Watch(producer.settings, producer.doing, lambda error: _leave(producer, error))
        given = others(args, _in_parts())
        args.sglang_weight_version = engine_weights.stamp(args.job_id, engine_weights.NEW)
        owner, facts = _start(args)  # the owner is kept: engines and router end with it
        resources.stop()
        _own_engines(args, producer, facts)
        producer.announce({**facts, "arguments": given})
        logger.info("job %s: slime's rollout half is ready", args.job_id)
        _Server(args, producer, facts["manager"]).serve()
        if owner is facts["manager"]:  # one actor, which closes what it tracks
            get(owner.dispose.remote(), Deadline(_QUICK_S), "slime's rollout manager")


class _Server:
    """Generates what is demanded, each rollout from where its source of prompts belongs."""

    def __init__(self, args: Any, producer: Producer, manager: Any):
        self._args, self._producer, self._manager = args, producer, manager
        self._tracking = Tracking(args, producer)
        self._beginning = self._in_manager(data_source.state)
        self._at: int | None = -1  # the source stands behind this generation; None: nobody knows
        self._layout: dict[str, Any] | None = None
        self._parts = 1
        self._skipping = False  # the source stands behind prompts of which nothing could be published
        self._compared: dict[str, Any] = {}  # arguments of the train job that were compared with ours

    def serve(self) -> None:
        """Until the train job is through, or this job is to stop (which raises Stopped)."""
        failures = 0
        limits = {"until": self._args.num_rollout, "gated": True}
        while (rollout_id := self._producer.patient_demand(**limits)) is not None:
            try:
                self._generate(rollout_id)
                failures = 0
            except ActorLost:
                raise
            except Unreachable as error:  # the vault died, and with it what was just generated
                failures += 1
                if failures == _ATTEMPTS:
                    raise
                logger.warning("job %s: rollout %d is generated again: %s", self._args.job_id, rollout_id, error)

    def _generate(self, rollout_id: int) -> None:
        self._hear_train_job()
        position, source = self._producer.source_before(rollout_id)
        if position == 0 and self._at == -1:  # the train job may have loaded the state of its checkpoint since
            self._beginning = self._in_manager(data_source.state)
        if self._at != position - 1:
            self._in_manager(data_source.restore, self._beginning if source is None else source)
            logger.info("job %s: the data source is set to where rollout %d begins", self._args.job_id, rollout_id)
        elif not self._skipping and source is not None and not self._in_manager(data_source.stands_at, source):
            raise BadInput(
                f"job {self._args.job_id}: prompts were drawn since the last rollout was published, and would be "
                "trained on twice. Does the function of --rollout-function-path draw some after it has returned, as "
                "fully asynchronous ones do, or that of --eval-function-path draw from the training data? Neither "
                "works across two jobs"
            )
        self._at = None
        try:
            published = self._producer.publish_from(
                rollout_id, self._manager, "generate", rollout_id=rollout_id, parts=self._parts
            )
        except BadInput as error:
            self._set_aside(rollout_id, position, error)
            return
        self._skipping = False
        if published.version:
            self._at = position
        logger.info(
            "job %s: rollout %d version %d published: %d samples, %d bytes",
            *(self._args.job_id, rollout_id, published.version, published.num_samples, published.nbytes),
        )
        if published.version:
            self._tracking.published(rollout_id)

    def _set_aside(self, rollout_id: int, position: int, error: BadInput) -> None:
        """What was generated cannot be published for what it holds, and could not be the next time either."""
        if self._producer.set_aside(rollout_id, str(error)) != SKIP:
            raise error
        logger.warning("job %s: rollout %d is generated from new prompts", self._args.job_id, rollout_id)
        self._at, self._skipping = position - 1, True

    def _hear_train_job(self) -> None:
        facts = self._producer.consumer_facts() or {}
        theirs = facts.get("arguments", {})
        if theirs != self._compared:
            self._compared = theirs
            if found := differences(others(self._args, _in_parts()), theirs):
                warn_of(self._args.job_id, "train", found)
        told = facts.get("train_parallel_config")
        if told is not None and told != self._layout:
            get(self._manager.set_train_parallel_config.remote(told), _AT_WORK, "slime's rollout manager")
            self._layout, self._parts = told, told["dp_size"]

    def _in_manager(self, function: Any, *args: Any) -> Any:
        return get(self._manager.__ray_call__.remote(function, *args), _AT_WORK, "slime's data source")


def _own_engines(args: Any, producer: Producer, facts: dict[str, Any]) -> None:
    """The engines are this job's, and are watched: each rollout tells what they say of their weights.

    Raises:
        WrongWeights: an engine that was found at the address of one of ours is another job's.
    """
    manager, engines = facts["manager"], facts.get("engines")
    if engines is None:
        deadline = Deadline(_QUICK_S)
        engines = get(manager.get_updatable_engines_and_lock.remote(), deadline, "slime's rollout manager")[0]
    own = args.sglang_weight_version
    for answer in engine_weights.ask(engines, engine_weights.said):
        other = (answer.version or "").split("/")[0]
        if (
            answer.external
            and answer.version not in (None, own)
            and other != args.job_id
            and engine_weights.lives(producer.connection, other)
        ):
            raise WrongWeights(
                f"the engine at {answer.url} is in use by job {other}, which gave it weights {answer.version}: give "
                "each job engines of its own (--rollout-external-engine-addrs), or stop that job first"
            )
    answers = engine_weights.ask(engines, engine_weights.claim, own)
    engine_weights.check_new(args.job_id, own, answers)
    logger.info("job %s: its engines: %s", args.job_id, ", ".join(answer.url for answer in answers) or "none")
    watch = manager.__ray_call__.remote(engine_weights.watch, facts.get("engines"))
    get(watch, Deadline(_QUICK_S), "slime's rollout manager")


def _leave(producer: Producer, error: CrossJobError) -> None:
    """End this process from a thread, while slime waits for Ray without end."""
    tell(error)
    with contextlib.suppress(CrossJobError, ray.exceptions.RayError):
        if isinstance(error, Stopped):
            producer.stop(str(error))
        else:
            producer.fail(str(error))
    ray.shutdown()
    os._exit(error.exit_code)


def _children_die_with_us() -> None:
    """Let no child outlive this driver, not even after SIGKILL (Linux): slime's router would keep its ports."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        os.register_at_fork(after_in_child=lambda: libc.prctl(1, signal.SIGTERM))  # 1: PR_SET_PDEATHSIG


def _in_parts() -> bool:
    """Whether slime at this pin splits a rollout where it generates it: from v0.3 on."""
    from slime.ray import placement_group

    return hasattr(placement_group, "create_training_models")


def _start(args: Any) -> tuple[Any, dict[str, Any]]:
    """slime's rollout half at this pin: its owner, and what the train job needs to reach it."""
    from slime.ray import placement_group

    from .hooks import placement

    pgs = placement_group.create_placement_groups(args) if placement(args)[0] else {"rollout": None}
    if _in_parts():  # one actor holds everything
        of_slime("init_tracking")(args)
        manager, _ = placement_group.create_rollout_manager(args, pgs["rollout"] or (None, [], []))
        get(manager.__ray_ready__.remote(), _AT_WORK, "slime's rollout manager")
        return manager, {"manager": manager}
    run_id = of_slime("init_wandb_primary")(args)
    owner = placement_group.create_rollout_manager(args, pgs["rollout"], wandb_run_id=run_id)
    buffer = getattr(owner, "controller", None) or owner.data_buffer
    if args.num_rollout is None:
        per_epoch = get(buffer.get_num_rollout_per_epoch.remote(), _AT_WORK, "slime's data source")
        args.num_rollout = per_epoch * args.num_epoch
    return owner, {"manager": buffer, "engines": owner.rollout_engines, "lock": owner.rollout_engine_lock}
