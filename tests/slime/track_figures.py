"""Tracks three rollouts of a job with slime's own logging: track_figures.py FOLDER [RUN]. For test_tracking.py.

RUN: id of the run in wandb that the job's clients agreed on.

slime, wandb (offline) and TensorBoard are real, and so is the ledger; no Ray runs: the producer is a stand-in that
knows the ledger's status only.
"""

import sys
from types import SimpleNamespace
from typing import Any

from slime.cross_job.adapter.names import of_slime
from slime.cross_job.adapter.tracking import Tracking, share_run
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import ClientInfo, Payload

ROLLOUTS = 3


def arguments(folder: str) -> SimpleNamespace:
    """Those of slime's arguments that its tracking reads."""
    wandb: dict[str, Any] = {"use_wandb": True, "wandb_mode": "offline", "wandb_key": None, "wandb_dir": folder}
    wandb |= {"wandb_random_suffix": False, "wandb_group": "exp", "wandb_team": None, "wandb_project": "cross-job"}
    tensorboard = {"use_tensorboard": True, "tb_project_name": None, "tb_experiment_name": None}
    return SimpleNamespace(**wandb, **tensorboard, rank=0, job_id="exp")


def main(folder: str, run_id: str = "") -> None:
    args = arguments(folder)
    if run_id:
        share_run(args, lambda name, mine: run_id)
    try:
        init = of_slime("init_tracking")
        finish = sys.modules[init.__module__].finish_tracking
    except ImportError:  # slime before v0.3, which has no TensorBoard either
        import wandb

        args.use_tensorboard = False
        init, finish = of_slime("init_wandb_primary"), lambda args: wandb.finish()
    init(args)
    ledger = Ledger()
    for client_id, role, group in (("p", "producer", ""), ("c", "consumer", "train")):
        ledger.membership.attach(ClientInfo(client_id, "exp", role, group=group))
    producer: Any = SimpleNamespace(job_id="exp", metrics=True, status=lambda: ledger.status("exp")["exp"])
    tracking = Tracking(args, producer)
    for rollout_id in range(ROLLOUTS):
        ledger.publish("p", rollout_id, Payload(f"t{rollout_id}", "vault/1", 100))
        tracking.published(rollout_id)
    finish(args)


if __name__ == "__main__":
    main(*sys.argv[1:])
