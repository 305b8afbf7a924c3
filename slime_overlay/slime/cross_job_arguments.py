"""The command-line flags of cross-job, for slime's argument parser and for any other.

Imports neither slime nor slime.cross_job, so that slime without the switch loads no line of it. What the flags mean
is said where they are used: `cross_job/settings.py` for the settings, `cross_job/hooks.py` for switch and role.
"""

import argparse
import re
from typing import Any

SETTINGS: dict[str, tuple[type, str]] = {
    "namespace": (str, "Ray namespace of the broker and the vaults, the same in both jobs (default: slime_shared)"),
    "max_ahead": (
        int,
        "rollouts generated beyond the last one demanded, 0: train.py's order, 1: train_async.py's (default: 0)",
    ),
    "retain": (
        int,
        "how many acked rollouts are kept, for a restart from an older checkpoint (default: 0; any number where one "
        "of the next two is given)",
    ),
    "retain_s": (float, "seconds for which acked rollouts are kept (default: no bound)"),
    "retain_bytes": (int, "bytes of acked rollouts that are kept (default: no bound)"),
    "retain_from": (
        str,
        "from when that counts, ack: after every consumer group acked it; publication: if no group reads the job, "
        "after its publication or last read. The oldest goes first, even if nobody read it (default: ack)",
    ),
    "forget_after_s": (
        float,
        "seconds after which a job that is complete is forgotten, with what its durable store keeps of it (default: "
        "604800.0, a week)",
    ),
    "max_bytes": (
        int,
        "bytes of rollouts that are kept; at this bound the rollout job waits for acks (default: no bound)",
    ),
    "max_staleness": (
        int,
        "how many weight versions a rollout may be behind those that train on it (default: any number)",
    ),
    "on_stale": (
        str,
        "what happens to a rollout that would be further behind, wait: it is generated later, drop: it is replaced by "
        "one of new prompts, regenerate: by one of the same prompts (default: wait)",
    ),
    "on_poison": (
        str,
        "what happens where a rollout cannot be published for what it holds, or 3 train jobs in a row ended while "
        "training on it, stop: both jobs end and name it, until its operator decides, skip: it is replaced by one of "
        "new prompts, once; `slime-cross-job quarantine` shows it (default: stop)",
    ),
    "store": (
        str,
        "URI of a durable store, besides the object store, for what is published and how the experiment stands: "
        "file:///a/shared/folder, redis://HOST:PORT/DB, or what pyarrow.fs reaches; everybody who sees processes and "
        "jobs sees a password in it, see the next two (default: none)",
    ),
    "store_mode": (
        str,
        "write-through: what is published is in the store before anybody hears of it, write-behind: soon after "
        "(default: write-through)",
    ),
    "compression": (str, "of what is stored: none, lz4 or zstd (default: none)"),
    "metrics": (str, "on, off: figures for Prometheus, through ray.util.metrics (default: on)"),
    "traces": (
        str,
        "on, off: both jobs tell what they did to each rollout, and when; see slime-cross-job trace (default: off)",
    ),
    "heartbeat_s": (float, "seconds between two signs of life (default: 1.0)"),
    "dead_after_s": (
        float,
        "seconds of silence after which a client's lease is over: others may take its place and what it holds; where "
        "Ray cannot tell whether it lives, its peers count it as dead (default: 30.0)",
    ),
    "peer_grace_s": (
        float,
        "seconds that a waiting job gives a failed peer to come back before it fails too (default: 0.0), 1800 for "
        "slime's rollout and train jobs",
    ),
    "resources_s": (
        float,
        "seconds that a job waits for a node that could hold its actors, as where nodes are added on demand "
        "(default: 600.0)",
    ),
    "timeout_s": (
        float,
        "seconds of silence, of missing resources, or in which every client of the job only waits, after which a wait "
        "ends with a verdict; a peer that is alive and at work is waited for without a bound (default: 3600.0)",
    ),
    "rollout_timeout_s": (
        float,
        "seconds that one rollout may take to generate before the rollout job fails (default: none)",
    ),
    "update_timeout_s": (
        float,
        "seconds that one update of slime's weights may take before the train job fails: slime would wait without end "
        "for a rank that hangs (default: 3600.0)",
    ),
}
"""Field of Settings -> its type and help. Absent flags are None: the defaults stay those of Settings."""

STORE_SOURCES: dict[str, str] = {
    "store_env": "name of the environment variable that holds the URI of the durable store, on every node where a "
    "process of the job reads its arguments (default: none)",
    "store_file": "path of the file that holds the URI of the durable store, on the same nodes (default: none)",
}
"""Where else the field `store` of Settings may come from, and the help of the flag. What parsed arguments hold is the
name or the path, never the URI: slime prints its arguments and gives them to wandb."""


_PASSWORD = re.compile(
    r"^(?!file:)\w[\w+.-]*://[^@]*:[^@]*@|"
    r"[?&]((sas_)?sig|[^=&]*(password|secret|token|access_key|account_key)[^=&]*)=",
    re.IGNORECASE,
)


def holds_password(uri: str) -> bool:
    """Whether a URI holds a password or a key, also one that would have to be quoted; in doubt, yes."""
    return _PASSWORD.search(uri) is not None


def flag(name: str) -> str:
    """The flag of a field of Settings."""
    return "--cross-job-" + name.replace("_", "-")


def add_settings(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--job-id` and the `--cross-job-*` settings to `parser` and return it."""
    group = parser.add_argument_group("cross-job", "rollout and training as separate Ray jobs")
    group.add_argument("--job-id", default=None, help="name of the experiment, the same in its rollout and train job")
    for name, (kind, text) in SETTINGS.items():
        group.add_argument(flag(name), type=kind, default=None, help=text)
    for name, text in STORE_SOURCES.items():
        group.add_argument(flag(name), default=None, help=text)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every cross-job flag to slime's parser: the settings, the switch and the role."""
    add_settings(parser)
    parser.add_argument(
        "--enable-cross-job-communication",
        action="store_true",
        default=False,
        help="publish rollouts for other Ray jobs; with --cross-job-role, run only one half of slime in this job",
    )
    parser.add_argument(
        "--cross-job-role",
        choices=["rollout", "train"],
        default=None,
        help="the half of slime that this Ray job runs: rollout (cross_job_rollout.py) or train (train.py, "
        "train_async.py); without it the job runs both, and publishes what it generates",
    )
    return parser


def check_arguments(args: Any) -> None:
    """Refuse combinations that cannot work, with the reason; called with slime's parsed and validated arguments.

    Raises:
        slime.cross_job.errors.BadInput: names the flags.
    """
    given = [
        flag(name) for name in (*SETTINGS, *STORE_SOURCES) if getattr(args, f"cross_job_{name}", None) is not None
    ]
    given += ["--cross-job-role"] if args.cross_job_role else []
    if args.enable_cross_job_communication or given or args.job_id:
        from slime.cross_job import arguments

        arguments.check(args, given)
