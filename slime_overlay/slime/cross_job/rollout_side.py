"""The driver of the rollout job: slime's own engines, router and data source generate what the train job demands."""

import ctypes
import logging
import os
import signal
from typing import Any

from . import arguments
from .errors import BadInput, EndOfStream, WaitTimeout
from .link import Deadline, ensure_ray, get
from .producer import Producer

logger = logging.getLogger(__name__)

_QUICK_S = 300.0  # deadline of calls to slime's manager that generate nothing


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
    with Producer(args.job_id, settings=arguments.settings(args)) as producer:
        producer.doing("starting slime's engines")
        owner, facts = _start(args)  # the owner is kept: engines and router end with it
        resumed = producer.resume_point()
        if resumed is not None:
            _restore(facts["manager"], *resumed)
        producer.announce(facts)
        logger.info("job %s: slime's rollout half is ready", args.job_id)
        _serve(args, producer, facts["manager"])
        if owner is facts["manager"]:  # one actor, which closes what it tracks
            get(owner.dispose.remote(), Deadline(_QUICK_S), "slime's rollout manager")


def _serve(args: Any, producer: Producer, manager: Any) -> None:
    layout: dict[str, Any] | None = None
    parts = 1
    while True:
        try:
            rollout_id = producer.next_demand(until=args.num_rollout, gated=True)
        except EndOfStream as end:
            logger.info("%s", end)
            return
        except WaitTimeout as waited:  # a training step may take its time; a train job that is not there may not
            if waited.verdict.get("kind") not in ("alive", "slow"):
                raise
            logger.warning("%s", waited)
            continue
        told = (producer.consumer_facts() or {}).get("train_parallel_config")
        if told is not None and told != layout:
            get(manager.set_train_parallel_config.remote(told), Deadline(_QUICK_S), "slime's rollout manager")
            layout, parts = told, told["dp_size"]
        published = producer.publish_from(rollout_id, manager, "generate", rollout_id=rollout_id, parts=parts)
        logger.info(
            "job %s: rollout %d version %d published: %d samples, %d bytes",
            *(args.job_id, rollout_id, published.version, published.num_samples, published.nbytes),
        )


def _children_die_with_us() -> None:
    """Let no child outlive this driver, not even after SIGKILL (Linux): slime's router would keep its ports."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        os.register_at_fork(after_in_child=lambda: libc.prctl(1, signal.SIGTERM))  # 1: PR_SET_PDEATHSIG


def _start(args: Any) -> tuple[Any, dict[str, Any]]:
    """slime's rollout half at this pin: its owner, and what the train job needs to reach it."""
    from slime.ray import placement_group

    from .hooks import placement

    pgs = placement_group.create_placement_groups(args) if placement(args)[0] else {"rollout": None}
    if hasattr(placement_group, "create_training_models"):  # from v0.3 on: one actor holds everything
        from slime.utils.logging_utils import init_tracking

        init_tracking(args)
        manager, _ = placement_group.create_rollout_manager(args, pgs["rollout"] or (None, [], []))
        get(manager.__ray_ready__.remote(), Deadline(arguments.settings(args).timeout_s), "slime's rollout manager")
        return manager, {"manager": manager}
    from slime.utils.wandb_utils import init_wandb_primary

    owner = placement_group.create_rollout_manager(args, pgs["rollout"], wandb_run_id=init_wandb_primary(args))
    buffer = getattr(owner, "controller", None) or owner.data_buffer
    if args.num_rollout is None:
        per_epoch = get(buffer.get_num_rollout_per_epoch.remote(), Deadline(_QUICK_S), "slime's data source")
        args.num_rollout = per_epoch * args.num_epoch
    return owner, {"manager": buffer, "engines": owner.rollout_engines, "lock": owner.rollout_engine_lock}


def _restore(manager: Any, rollout_id: int, meta: dict[str, Any]) -> None:
    """Set the data source of a new rollout job to where the old one left it after its last published rollout."""
    state = meta.get("data_source") or {}
    get(manager.__ray_call__.remote(_set_data_source, state), Deadline(_QUICK_S), "slime's data source")
    logger.info("the data source goes on after rollout %d: %s", rollout_id, state)


def _set_data_source(manager: Any, state: dict[str, Any]) -> None:
    source = manager.data_source
    for name, value in state.items():
        setattr(source, name, value)
    if getattr(source, "dataset", None) is not None and manager.args.rollout_shuffle:
        source.dataset.shuffle(source.epoch_id)
