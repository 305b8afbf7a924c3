"""What slime's two jobs must agree on, so that a disagreement is refused before anything is generated.

All of slime's parsed arguments are compared. MAY_DIFFER lists those that one job alone reads. Each job states those of
MUST_AGREE when it attaches, and the broker refuses another value (Membership.attach). The jobs tell each other the
rest, and warn of differences. Slime derives attributes from its flags: what is compared is what it derived.

The number of data-parallel ranks is not compared: the train job announces its own, the rollout job splits by it, and
what was split for another train job is split anew (dp_split.py).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..redaction import without_password
from ..types import in_words, shortened
from . import dp_split

logger = logging.getLogger(__name__)

MAY_DIFFER = (
    # settings of cross-job, which the broker compares
    *("cross_job_*", "job_id", "enable_cross_job_communication"),
    # how far the train job goes
    *("num_rollout", "num_epoch", "start_rollout_id", "train_iters"),
    # what slime derives from the checkpoints that it finds in --load when a job starts
    *("load", "finetune", "no_load_optim", "no_load_rng", "ckpt_step"),
    # GPUs of the training, and which of its processes this is
    *("actor_num_*", "critic_num_*", "num_gpus_per_node", "world_size", "rank", "local_rank", "*_parallel_size"),
    "train_env_vars",  # may hold secrets
    # how the rollout job runs its engines, router and health checks
    *("sglang_*", "router_*", "prefill_num_servers", "rollout_health_check_*", "rollout_num_gpus_per_node"),
    *("rollout_external_engine_infos",),
    # figures and files to look at
    *("use_wandb", "wandb_*", "use_tensorboard", "tb_*", "log_*", "save_debug_*", "dump_details"),
    *("profile*", "use_pytorch_profiler", "record_memory_history", "memory_*"),
    # replays (cross_job_replay.py serve) have no engines
    *("debug_train_only", "load_debug_rollout_data*"),
)
"""Patterns of attributes that only one of the jobs reads."""

_FROM_PARTS = ("rollout_num_gpus", "rollout_num_engines", "rollout_num_gpus_per_engine")
"""From v0.3 on the train job asks the rollout job for its engines; before, these size the group of weight updates."""

_PROMPTS = (
    *("data_source_path", "prompt_data", "input_key", "label_key", "metadata_key", "tool_key", "multimodal_keys"),
    *("apply_chat_template*", "over_sampling_*", "dynamic_sampling_filter_path", "buffer_filter_path"),
    *("min_batch_collection_ratio", "fetch_trajectory_retry_times"),
)
_EVALUATION = (  # the train job says when, the rollout job does it by its own arguments
    *("eval_datasets", "eval_prompt_data", "eval_config", "eval_function_path", "eval_*_key", "eval_temperature"),
    *("eval_top_*", "eval_max_*", "eval_min_*", "n_samples_per_eval_prompt"),
)
_WEIGHT_TRANSPORT = (
    *("update_weight_mode", "update_weight_transport", "update_weight_disk_dir", "update_weight_delta_*"),
    *("update_weight_local_checkpoint_dir", "use_fault_tolerance"),
)
MUST_AGREE = (
    # how much, in which portions
    *("rollout_*", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout", "partial_rollout"),
    # what the numbers mean, and which columns there are
    *("custom_generate_function_path", "custom_rm_path", "rm_*", "group_rm", "reward_key", "use_token_output"),
    *("custom_reward_post_process_path", "custom_convert_samples_to_train_data_path", "advantage_estimator"),
    *("rewards_normalization", "grpo_std_normalization", "loss_mask_type", "mask_offpolicy_in_partial_rollout"),
    *("use_rollout_*", "use_tis", "custom_tis_function_path", "use_opd", "opd_type", "use_opsm"),
    *("get_mismatch_metrics", "calculate_per_token_loss", "balance_data", "use_critic"),
    *_PROMPTS,
    *_EVALUATION,
    *_WEIGHT_TRANSPORT,
)
"""Patterns of attributes on which rollout data, prompts, the way of the weights or the size of their group depend."""

_SECRET = re.compile(r"api_key|wandb_key|password|secret|(^|_)(access|auth|hf)_token")
_MOST_CHARACTERS = 200  # of a value; of longer ones a digest is compared

PIN = "slime's code for rollout data (its pin)"
TOKENIZER = "the tokenizer in --hf-checkpoint"
OF_THE_DATA = (PIN, TOKENIZER)
"""Terms that hold for what is published and not acked, too, whoever ended meanwhile."""

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_DATA_CODE = (
    *("utils/types.py", "utils/data.py", "backends/utils/data.py", "ray/buffer.py", "ray/rollout.py"),
    *("utils/dp_schedule.py", "observability/rollout_data_utils.py"),
)


def terms(args: Any, in_parts: bool) -> dict[str, Any]:
    """What a job with these arguments takes for granted: JSON-able values by a name that the other job understands.

    Args:
        in_parts: slime at this pin splits a rollout among training ranks where it generates it.
    """
    stated = {_flag(name): _plain(value) for name, value in _of_kind(args, in_parts, must=True)}
    if getattr(args, "cross_job_role", None) != "train":  # whose own word counts, see WeightGate.begin_update
        ends = {_flag(name): getattr(args, name, None) for name in ("num_rollout", "num_epoch")}
        stated |= {name: value for name, value in ends.items() if value is not None}
    stated[PIN] = _digest(_existing(Path(__file__).parents[2], _DATA_CODE))
    checkpoint = getattr(args, "hf_checkpoint", None)
    if checkpoint:
        files = _existing(Path(checkpoint), _TOKENIZER)
        stated[TOKENIZER] = _digest(files) if files else str(checkpoint)
    return stated


def of_a_recording(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The terms that hold for a train job which reads a recording of this job. Those of prompts, evaluation and weight
    transport do not: such a train job has no engines, and the files they name may have moved."""
    unread = (*_PROMPTS, *_EVALUATION, *_WEIGHT_TRANSPORT, *_FROM_PARTS)
    return {name: value for name, value in stated.items() if not _matches(_attribute(name), unread)}


def others(args: Any, in_parts: bool) -> dict[str, Any]:
    """The arguments that should agree, and need not: JSON-able values by flag, see `differences`."""
    return {_flag(name): _plain(value) for name, value in _of_kind(args, in_parts, must=False)}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One line for each of the `others` that both jobs have, with different values."""
    both = sorted(name for name in mine if name in theirs and mine[name] != theirs[name])
    return [f"{name} is {in_words(mine[name])} here and {in_words(theirs[name])} there" for name in both]


def warn_of(job_id: str, peer: str, found: list[str]) -> None:
    """Say in this job's log which arguments differ from those of the `peer` job (rollout or train)."""
    logger.warning(
        "job %s: %d arguments differ from those of the %s job. Rollouts do not depend on them. Unless the "
        "difference is intended, give both jobs the same:\n  %s",
        *(job_id, len(found), peer, "\n  ".join(found)),
    )


def _of_kind(args: Any, in_parts: bool, must: bool) -> Iterator[tuple[str, Any]]:
    may_differ = (*MAY_DIFFER, *_FROM_PARTS) if in_parts else MAY_DIFFER
    agree = (*MUST_AGREE, *dp_split.ARGUMENTS) if in_parts else MUST_AGREE
    for name, value in vars(args).items():
        of_one = name.startswith("_") or _matches(name, may_differ) or _SECRET.search(name)
        if not of_one and _matches(name, agree) == must:
            yield name, value


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _plain(value: Any) -> Any:
    """The value, where JSON has it and it is short; else what it is, in words that another process finds, too."""
    try:
        text = json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        value = text
    if without_password(text.strip('"')) != text.strip('"'):
        return f"(not shown) sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if len(text) > _MOST_CHARACTERS:
        return f"{shortened(text, _MOST_CHARACTERS)} sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return json.loads(text) if value is not text else text


def _existing(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _digest(files: list[Path]) -> str:
    """Short name of the contents of these files, the same wherever they lie."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]
