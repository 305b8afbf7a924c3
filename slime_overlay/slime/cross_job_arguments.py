"""The flags of cross-job in slime's parser, and what is checked of them; called by patched lines of slime.

Imports nothing of slime.cross_job, so that slime without the switch loads no line of it.
"""

import argparse
from typing import Any

from .cross_job_settings import ABOUT, STORE_SOURCES, add_settings, flag


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
    given = [flag(name) for name in (*ABOUT, *STORE_SOURCES) if getattr(args, f"cross_job_{name}", None) is not None]
    given += ["--cross-job-role"] if args.cross_job_role else []
    if args.enable_cross_job_communication or given or args.job_id:
        from slime.cross_job.adapter import arguments

        arguments.check(args, given)
