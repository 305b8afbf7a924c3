"""Which of slime's arguments go together with cross-job, and which do not. The flags: slime/cross_job_arguments.py."""

import argparse
import importlib
import logging
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..settings import Settings
from ..types import check_job_id

logger = logging.getLogger(__name__)

PEER_GRACE_S = 1800.0
"""How long slime's jobs let each other be started again, where --cross-job-peer-grace-s does not say otherwise."""

_TOGETHER = "rollout and training share no GPU across jobs"
_REFUSED = {  # attribute of slime's arguments (at any pin) -> why it cannot be set in a job with a role
    "colocate": _TOGETHER,
    "offload": _TOGETHER,
    "offload_rollout": _TOGETHER,
    "release_train": "it makes room for engines on the same GPUs; " + _TOGETHER,
    "debug_rollout_only": "it runs without training; run slime without --cross-job-role for that",
}


def settings(args: Any) -> Settings:
    """The settings of a job of slime."""
    if getattr(args, "cross_job_peer_grace_s", None) is None and args.cross_job_role:
        args = argparse.Namespace(**{**vars(args), "cross_job_peer_grace_s": PEER_GRACE_S})
    return Settings.from_args(args)


def staleness_adds_up(script: str, max_ahead: int) -> str | None:
    """What to say of a train job that runs this script, or None: train_async.py asks for a rollout ahead by itself."""
    if Path(script).name != "train_async.py" or not max_ahead:
        return None
    return (
        f"train_async.py demands each rollout one step ahead, and --cross-job-max-ahead {max_ahead} goes further: "
        f"weights train on rollouts that are up to {max_ahead + 1} versions behind. To be at most one version behind, "
        "use train.py with --cross-job-max-ahead 1, or train_async.py with 0"
    )


def check(args: Any, given: list[str]) -> None:
    """Raise BadInput for a combination that cannot work; `given` are the cross-job flags that were set."""
    if not args.enable_cross_job_communication:
        flags = ", ".join([*given, *(["--job-id"] if args.job_id else [])])
        raise BadInput(f"{flags} without --enable-cross-job-communication: add the switch, or leave the others out")
    check_job_id(args.job_id)
    settings(args)
    if not args.cross_job_role:
        return
    for name, why in _REFUSED.items():
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} does not go with --cross-job-role {args.cross_job_role}: {why}")
    if getattr(args, "update_weight_mode", "full") != "full":
        raise BadInput(
            f"--update-weight-mode {args.update_weight_mode} does not go with --cross-job-role: its first update "
            "only records the weights that later ones are compared with, and the engines would generate with whatever "
            "weights they have: use --update-weight-mode full"
        )
    if getattr(args, "ci_test", False) and getattr(args, "update_weight_transport", "") == "disk":
        raise BadInput(
            "--ci-test does not go with --update-weight-transport disk here: it expects engines to report slime's own "
            "number of an update, and they report this job's stamp, which is verified at every update: leave it out"
        )
    if getattr(args, "rollout_data_transport", "object-store") != "object-store":
        raise BadInput(
            f"--rollout-data-transport {args.rollout_data_transport}: its data ends with the rollout job's process. "
            "Leave it out: vaults keep the rollouts in the object store"
        )
    function = str(getattr(args, "rollout_function_path", None) or "")
    if "fully_async" in function:
        raise BadInput(
            f"--rollout-function-path {function} does not go with --cross-job-role {args.cross_job_role}: its worker "
            "draws prompts after a rollout is published, so that some would be trained on twice when a job is started "
            "again. Use slime's own rollout function, with --cross-job-max-ahead 1 to generate while training"
        )
    without_engines = getattr(args, "debug_train_only", False) or getattr(args, "rollout_external", False)
    if getattr(args, "use_critic", False):
        _check_critic(args)
    if not args.rollout_num_gpus and not without_engines:
        raise BadInput(
            "--rollout-num-gpus is not set: give it to both jobs (the rollout job places its engines by it, the "
            "train job sizes the weight-update group)"
        )


def _check_critic(args: Any) -> None:
    """PPO, from v0.3 on: a checkpoint is one of the actor and one of the critic, and training goes on from both."""
    roles = [args, args]
    if args.megatron_config_path is not None:
        of_role = importlib.import_module("slime.utils.arguments").parse_megatron_role_args
        try:
            roles = [of_role(args, args.megatron_config_path, role=role) for role in ("actor", "critic")]
        except OSError:  # slime itself reads it in the train job only, and says it there
            return
    actor, critic = roles
    actor_trains = args.num_rollout is None or args.num_critic_only_steps < args.num_rollout
    if actor.save is not None and actor.save == critic.save and actor_trains:
        raise BadInput(
            f"PPO's critic would write its checkpoints over the actor's, in {actor.save}, and no job could go on "
            "from them: give the actor a `save` and a `load` of its own in --megatron-config-path. Then --save and "
            "--load are those of the critic, which alone is saved in the first --num-critic-only-steps"
        )
    if critic.save != args.save and actor_trains and args.num_critic_only_steps > 0:
        logger.warning(
            "job %s: no train job can go on from one that ends in the first %d rollouts (--num-critic-only-steps): "
            "slime looks for a checkpoint in --load, and only the critic has one then, in %s. Let --save and --load "
            "name that folder, and give the actor a `save` and a `load` of its own in --megatron-config-path",
            *(args.job_id, args.num_critic_only_steps, critic.save),
        )
    if args.cross_job_role == "train" and actor.load == actor.save:
        last, last_of_critic = (_checkpoint(role) for role in roles)
        if None not in (last, last_of_critic) and last != last_of_critic:
            raise BadInput(
                f"the actor would go on from a checkpoint after rollout {last} ({actor.load}), the critic from one "
                f"after rollout {last_of_critic} ({critic.load}): an earlier job ended between saving the two. Give "
                "--ckpt-step the last rollout for which both have a checkpoint"
            )


def _checkpoint(args: Any) -> int | None:
    """The last rollout in the checkpoint that a role of slime loads; None: it goes on from none."""
    if args.load is None or args.finetune:
        return None
    if args.ckpt_step is not None:
        return int(args.ckpt_step)
    try:
        return int(Path(args.load, "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return None
