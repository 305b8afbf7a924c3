"""The job's figures in wandb and TensorBoard, from slime's rollout job, where slime's run uses them: after each
published rollout, under `cross_job/`, over slime's own `rollout/step`.

They are those that Prometheus gets (metrics.py), of the whole job, the train side included. A failure is said once,
and never hurts the run. Jobs with --cross-job-metrics off log nothing.

Rollout and train job, and whatever restarts of them, are one run in wandb, as slime's single job is (`share_run`).
"""

import importlib
import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

from ..client.producer import Producer
from ..metrics import figures
from .names import of_slime

logger = logging.getLogger(__name__)

STEP = "rollout/step"
_RUN_ID = "WANDB_RUN_ID"


def share_run(args: Any, agree: Callable[[str, str], str]) -> None:
    """Let this process, before slime begins to track in it, join the job's run in wandb: the first job chooses its id,
    later ones resume it. A WANDB_RUN_ID of the user's is the id, if this job is the first.

    Args:
        agree: see Session.agree.
    """
    if not getattr(args, "use_wandb", False):
        return
    mine = os.environ.get(_RUN_ID, "")
    run_id = agree("wandb run id", mine or uuid.uuid4().hex[:8])
    if mine and mine != run_id:
        logger.warning(
            "job %s: its run in wandb is %s, as its first job said; %s=%s is not used. For another run, begin under "
            "another --job-id",
            *(args.job_id, run_id, _RUN_ID, mine),
        )
    os.environ[_RUN_ID] = run_id  # which wandb.init reads: slime gives it no id
    os.environ["WANDB_RESUME"] = "allow"
    logger.info("job %s: its run in wandb is %s", args.job_id, run_id)


class Tracking:
    """See the module. `args`: slime's, after slime has begun to track the run in this process."""

    def __init__(self, args: Any, producer: Producer):
        self._args, self._producer = args, producer
        self._wanted = producer.metrics and any(getattr(args, use, False) for use in ("use_wandb", "use_tensorboard"))
        self._failed = self._defined = False

    def published(self, rollout_id: int) -> None:
        """Log how the job stands, now that this rollout is published."""
        if not self._wanted:
            return
        try:
            self._log({**named(self._producer.status()), STEP: rollout_id})
        except Exception as error:  # whatever wandb, TensorBoard or a broker that restarts make of it
            if not self._failed:
                logger.warning(
                    "job %s: its figures are not in wandb or TensorBoard (logged once): %s: %s",
                    *(self._producer.job_id, type(error).__name__, error),
                )
            self._failed = True

    def _log(self, found: dict[str, float]) -> None:
        if getattr(self._args, "use_wandb", False):
            self._define()
        try:
            log = of_slime("log")
        except ImportError:
            if getattr(self._args, "use_wandb", False):  # all that slime has before v0.3
                importlib.import_module("wandb").log(found)
            if getattr(self._args, "use_tensorboard", False):
                raise
            return
        log(self._args, found, step_key=STEP)

    def _define(self) -> None:
        """Let wandb draw them over slime's step, as slime does with its own; once."""
        if not self._defined:
            self._defined = True
            importlib.import_module("wandb").define_metric("cross_job/*", step_metric=STEP)


def named(status: dict[str, Any]) -> dict[str, float]:
    """cross_job/NAME[/LABEL...] -> value, of every figure that the status tells."""
    return {"/".join(("cross_job", name, *labels)): value for (name, labels), value in figures(status).items()}
