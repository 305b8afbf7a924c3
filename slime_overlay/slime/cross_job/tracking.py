"""The job's figures in wandb and TensorBoard, from slime's rollout job, where slime's run uses them: after each
published rollout, under `cross_job/`, over slime's own `rollout/step`.

They are those that Prometheus gets (metrics.py), of the whole job, the train side included. A failure is said once,
and never hurts the run. Jobs with --cross-job-metrics off log nothing.
"""

import importlib
import logging
from typing import Any

from .metrics import figures
from .producer import Producer

logger = logging.getLogger(__name__)

STEP = "rollout/step"


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
                    "job %s: its figures are not in wandb or TensorBoard (said once): %s: %s",
                    *(self._producer.job_id, type(error).__name__, error),
                )
            self._failed = True

    def _log(self, found: dict[str, float]) -> None:
        if getattr(self._args, "use_wandb", False):
            self._define()
        try:
            from slime.utils.logging_utils import log  # slime from v0.3 on: wandb and TensorBoard
        except ImportError:
            importlib.import_module("wandb").log(found)
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
