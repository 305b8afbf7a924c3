"""Process groups (NCCL) and lock of slime's weight updates, when one of their sides is a new process.

slime makes one group a pipeline stage between training ranks and engines, and keeps it for the life of both. An
engine refuses a second group of the same name, so what a dead train job left in it is ended first; training ranks
must not call engines that are dead, so what they hold of them is dropped.
"""

import logging
from typing import Any

import ray

logger = logging.getLogger(__name__)


def names(args: Any) -> list[str]:
    """The groups that slime's training ranks make; none where weights travel over disk."""
    if getattr(args, "update_weight_transport", "nccl") == "disk":
        return []
    return [f"slime-pp_{stage}" for stage in range(getattr(args, "pipeline_model_parallel_size", 1))]


def end(engines: list[Any], groups: list[str], timeout_s: float = 60.0) -> None:
    """End those groups in slime's engine actors; that an engine has none is no error."""
    for group in groups:
        for engine in engines:
            method = getattr(engine, "destroy_weights_update_group", None)  # from v0.3 on; None: there was none
            try:
                if method is not None:
                    ended = ray.get(method.remote(group), timeout=timeout_s)
                else:
                    request = engine._make_request.remote
                    ended = ray.get(request("destroy_weights_update_group", {"group_name": group}), timeout=timeout_s)
            except ray.exceptions.GetTimeoutError:
                logger.warning(
                    "an engine did not end the group %s within %g s: it may wait for a train job that died while it "
                    "sent weights. If the next weight update does not end either, start the rollout job again",
                    *(group, timeout_s),
                )
            except (AttributeError, ray.exceptions.RayError) as error:
                logger.debug("no group %s to end: %s", group, error)
            else:
                if ended:
                    logger.info("ended the group %s that an earlier train job left in an engine", group)


def unlock(lock: Any, timeout_s: float = 60.0) -> None:
    """Free slime's lock on the engines: whoever holds it is gone, and others would poll it for ever."""
    try:
        ray.get(lock.release.remote(), timeout=timeout_s)
        logger.info("freed the lock on the engines, which an earlier train job held when it died")
    except ray.exceptions.RayTaskError:
        pass  # it was free: slime asserts that it is not


def count_from(training_actor: Any, number: int) -> None:
    """In the process of slime's training actor: the next weight update over disk is the one behind `number`."""
    training_actor.weight_updater.weight_version = number


def forget(training_actor: Any) -> None:
    """In the process of slime's training actor: drop the engines that it was connected to."""
    updater = getattr(training_actor, "weight_updater", None)
    if updater is not None and getattr(updater, "rollout_engines", None):
        updater.rollout_engines = []
