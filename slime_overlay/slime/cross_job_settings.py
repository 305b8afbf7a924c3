"""The settings of cross-job: one table, of which the command-line flags are made.

Imports neither slime nor slime.cross_job: slime without the switch loads no line of that, and the launcher reads the
table where slime is not. Values are checked by `cross_job/settings.py`; switch and role: `cross_job_arguments.py`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_SWITCH = ("on", "off")


def _setting(
    text: str,
    default: Any = None,
    *,
    of_job: bool = False,
    standard: Any = None,
    shown: str = "",
    choices: Sequence[str] = (),
    least: float = 0,
    **of_field: Any,
) -> Any:
    """A field of Table.

    Args:
        text: what its flag does.
        of_job: it is the job's, and all clients that state it must agree. None: as others say, or `standard`.
        shown: the default in words, where the value does not tell.
        choices: what it may be. least: the smallest number it may be.
    """
    shown = shown or str(standard if of_job else default)
    about = {"of_job": of_job, "standard": standard, "choices": choices, "least": least}
    return field(default=default, metadata={"help": f"{text} (default: {shown})", **about}, **of_field)


def _of_job(text: str, standard: Any = None, shown: str = "", **more: Any) -> Any:
    return _setting(text, of_job=True, standard=standard, shown=shown, **more)


def _kind(annotation: Any) -> type:
    """int of `int` and of `int | None`."""
    kind: type = next(iter(getattr(annotation, "__args__", ())), annotation)
    return kind


@dataclass(frozen=True)
class Table:
    """A setting each, see `cross_job.settings.Settings`: its type, flag, help, default and bounds."""

    max_ahead: int | None = _of_job(
        "rollouts generated beyond the last one demanded, 0: train.py's order, 1: train_async.py's", 0
    )
    retain: int | None = _of_job(
        "how many acked rollouts are kept, for a restart from an older checkpoint",
        shown="0; any number where one of the next two is given",
    )
    retain_s: float | None = _of_job("seconds for which acked rollouts are kept", shown="no bound")
    retain_bytes: int | None = _of_job("bytes of acked rollouts that are kept", shown="no bound", least=1)
    retain_from: str | None = _of_job(
        "from when the three limits of --cross-job-retain count, ack: after every consumer group acked the rollout; "
        "publication: if no group reads the job, after its publication or last read. The oldest goes first, even if "
        "nobody read it",
        "ack",
        choices=("ack", "publication"),
    )
    forget_after_s: float | None = _of_job(
        "seconds after which a job that is complete is forgotten, with what its durable store keeps of it",
        604_800.0,
        "604800.0, a week",
    )
    max_bytes: int | None = _of_job(
        "bytes of rollouts that are kept; at this bound the rollout job waits for acks", shown="no bound", least=1
    )
    max_staleness: int | None = _of_job(
        "how many weight versions a rollout may be behind those that train on it", shown="any number"
    )
    on_stale: str | None = _of_job(
        "what happens to a rollout that would be further behind, wait: it is generated later, drop: it is replaced by "
        "one of new prompts, regenerate: by one of the same prompts",
        "wait",
        choices=("wait", "drop", "regenerate"),
    )
    on_poison: str | None = _of_job(
        "what happens if a rollout cannot be published because of what it holds, or if 3 train jobs in a row ended "
        "while training on it, stop: both jobs end and name it, until an operator decides on it, skip: it is replaced "
        "by one of new prompts, once; `slime-cross-job quarantine` shows it",
        "stop",
        choices=("stop", "skip"),
    )
    store: str | None = _of_job(
        "URI of a durable store, besides the object store, for what is published and how the experiment stands: "
        "file:///a/shared/folder, redis://HOST:PORT/DB, s3://BUCKET/PATH, gs://, az://; everybody who can list "
        "processes or jobs sees a password in it: then use --cross-job-store-env or --cross-job-store-file",
        shown="none",
        repr=False,  # it may hold a password
    )
    store_mode: str | None = _of_job(
        "write-through: what is published is in the store before anybody hears of it, write-behind: soon after",
        "write-through",
        choices=("write-through", "write-behind"),
    )
    compression: str | None = _of_job("of what is stored: none, lz4 or zstd", "none", choices=("none", "lz4", "zstd"))
    metrics: str | None = _of_job("on, off: figures for Prometheus, through ray.util.metrics", "on", choices=_SWITCH)
    traces: str | None = _of_job(
        "on, off: both jobs record what they do with each rollout, and when; see slime-cross-job trace",
        "off",
        choices=_SWITCH,
    )
    namespace: str = _setting("Ray namespace of the broker and the vaults, the same in both jobs", "slime_shared")
    heartbeat_s: float = _setting("seconds between two signs of life", 1.0, least=0.05)
    dead_after_s: float = _setting(
        "seconds of silence after which a client's lease is over: others may take its place and what it holds; where "
        "Ray cannot tell whether it lives, its peers count it as dead",
        30.0,
    )
    peer_grace_s: float = _setting(
        "seconds that a waiting job gives a failed peer to come back before it fails too; slime's rollout and train "
        "jobs have 1800",
        0.0,
    )
    resources_s: float = _setting(
        "seconds that a job waits for a node that could hold its actors, such as one that is added on demand", 600.0
    )
    timeout_s: float = _setting(
        "seconds of silence, of missing resources, or in which every client of the job only waits, after which a wait "
        "ends with a verdict; a peer that is alive and at work is waited for without a bound",
        3600.0,
    )
    rollout_timeout_s: float | None = _setting(
        "seconds that one rollout may take to generate before the rollout job fails", shown="none"
    )
    update_timeout_s: float = _setting(
        "seconds that one update of slime's weights may take before the train job fails: slime would wait without end "
        "for a rank that hangs",
        3600.0,
    )


ABOUT = {one.name: {"kind": _kind(one.type), **one.metadata} for one in fields(Table)}
"""Name of a setting -> {"kind" (int, float or str), "help", "of_job", "standard" (default of a job's), "choices",
"least"}."""

OF_JOB = tuple(name for name, about in ABOUT.items() if about["of_job"])
"""The settings of a job, which its clients state when they attach."""


STORE_SOURCES: dict[str, str] = {
    "store_env": "name of the environment variable that holds the URI of the durable store, on every node where a "
    "process of the job reads its arguments (default: none)",
    "store_file": "path of the file that holds the URI of the durable store, on the same nodes (default: none)",
}
"""Where else the field `store` of Settings may come from, and the help of the flag. What parsed arguments hold is the
name or the path, never the URI: slime prints its arguments and gives them to wandb."""


_PASSWORD = re.compile(
    r"^(?!file:)\w[\w+.-]*://[^@]*:[^@]*@|"
    r"[?&]((sas_)?sig|[^=&]*(password|secret|token|_key(?=[_=]))[^=&]*)=",
    re.IGNORECASE,
)


def holds_password(uri: str) -> bool:
    """Whether a URI holds a password or a key, also one that would have to be quoted; in doubt, yes."""
    return _PASSWORD.search(uri) is not None


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--cross-job-" + name.replace("_", "-")


def add_settings(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--job-id` and the `--cross-job-*` settings to `parser` and return it."""
    group = parser.add_argument_group("cross-job", "rollout and training as separate Ray jobs")
    group.add_argument("--job-id", default=None, help="name of the experiment, the same in its rollout and train job")
    for name, about in ABOUT.items():
        group.add_argument(flag(name), type=about["kind"], default=None, help=about["help"])
    for name, text in STORE_SOURCES.items():
        group.add_argument(flag(name), default=None, help=text)
    return parser
