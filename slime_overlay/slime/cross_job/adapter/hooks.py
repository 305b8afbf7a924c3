"""What the patched lines of slime call, once --enable-cross-job-communication is given; each line's whole logic.

arguments.py          cross_job_arguments.add_arguments, check_arguments
placement_group.py    placement, train_group, gateway      a job of one role holds only its own half of slime
buffer.py, rollout.py publish                              what slime generated becomes a published rollout
data.py               CrossJobBox.process                  each rank reads its own rows
sglang_engine.py      base_gpu_id, engine_ports            engines use the GPUs that Ray gave them, and own ports
"""

import importlib
import logging
from typing import Any

from ..errors import BadInput, BatchError, ContentRefused
from . import arguments, data_source, engine_weights

logger = logging.getLogger(__name__)

_taps: dict[str, Any] = {}


def placement(args: Any) -> tuple[int, int]:
    """(GPUs of this job's placement group, index of the first rollout GPU in it) for the job's role.

    slime then waits for them without end, and up to v0.1 without a word: what is missing is said here, also to the
    other job, and the wait has an end (placement.py). The train job introduces itself before it takes any of them.
    """
    import ray

    from ..client.connection import ensure_ray

    if args.cross_job_role == "train":
        from .train_driver import TrainDriver

        TrainDriver.of(args)
        gpus = args.actor_num_nodes * args.actor_num_gpus_per_node
    elif args.debug_train_only or getattr(args, "rollout_external", False):
        gpus = 0
    else:
        gpus = args.rollout_num_gpus
    ensure_ray(log_to_driver=True)
    free = ray.available_resources().get("GPU", 0)
    if free < gpus:
        logger.warning(
            "job %s: this %s job waits for %d GPUs; %g of the cluster's %g are free: stop what holds them, add nodes, "
            "or ask for fewer",
            *(args.job_id, args.cross_job_role, gpus, free, ray.cluster_resources().get("GPU", 0)),
        )
    return gpus, 0


def base_gpu_id() -> int:
    """First GPU of the engine whose actor this is, as Ray numbers it on this node.

    slime counts the train job's GPUs first, which holds only where both halves share a placement group.
    """
    import ray

    return int(ray.get_gpu_ids()[0])


def engine_ports(module: Any = None) -> None:
    """In the process of an engine actor: slime's search for free ports takes what it finds, see ports.py.

    Args:
        module: slime's `slime.ray.ray_actor`; imported where it is not given.
    """
    from . import ports

    if module is None:
        module = importlib.import_module("slime.ray.ray_actor")
    if hasattr(module, "get_free_port"):  # from v0.3 on
        module.get_free_port = ports.take
    else:
        module.is_port_available = ports.take_this


def publish(manager: Any, rollout_id: int, data: dict[str, Any]) -> Any:
    """Publish what slime's Buffer or RolloutManager made of rollout `rollout_id`; what its `generate` returns.

    In a rollout job the vault has called `generate`, and owns what is returned here: a header and the packed parts. A
    job without a role publishes from this process and gets boxes that read from the published rollout.
    """
    from ..client.producer import returned
    from .conversion import published

    args = manager.args
    try:
        parts, meta = published(manager, data)
    except BatchError as error:
        raise ContentRefused(f"rollout {rollout_id} of job {args.job_id} cannot be published: {error}") from None
    if args.cross_job_role == "rollout":
        meta |= engine_weights.of_rollout(manager)
        return returned(*parts, meta=meta, source=data_source.state(manager))
    if args.cross_job_role is not None:
        raise BadInput(
            f"a job of role {args.cross_job_role} generates no rollouts: start cross_job_rollout.py for that"
        )
    if args.job_id not in _taps:
        from .tap import Tap

        number = args.num_rollout
        if number is None:  # slime told its driver only, up to v0.1
            number = manager.get_num_rollout_per_epoch() * args.num_epoch
        _taps[args.job_id] = Tap(args.job_id, arguments.settings(args), number)
    return _taps[args.job_id].publish(rollout_id, parts, meta, in_parts=hasattr(manager, "_split_train_data_by_dp"))


def gateway(args: Any) -> Any:
    """The train job's stand-in for slime's rollout manager; what `create_rollout_manager` returns at this pin."""
    from .train_driver import TrainDriver

    return TrainDriver.of(args).manager()


def train_group(group: Any, critic: Any = None) -> None:
    """Let slime's groups of training actors (of the critic, too, where there is one) ask before they update weights,
    and tell what they train on and save."""
    from .train_driver import TrainDriver
    from .train_group import adopt

    adopt(group, TrainDriver.of(group.args), critic)
