"""Stands for slime's MegatronTrainRayActor from v0.3.1 on: learns on the CPU, sends full weights to the engines.

With `--update-weight-transport disk --update-weight-disk-dir DIR` it writes DIR/weight_vNNNNNN as slime's
UpdateWeightFromDisk does, and slime's own RayTrainGroup makes the engines load it. With `nccl` slime's own
UpdateWeightFromDistributed sends them over gloo, see weights_over_gloo.py.
"""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import ray
import torch.distributed as dist
from slime.ray.train_actor import TrainRayActor

try:
    from slime.observability.train_data_utils import save_debug_train_data
except ImportError:  # before it moved there
    from slime.utils.train_dump_utils import save_debug_train_data


class ToDisk:
    """Rank 0 writes a folder; the engines are only remembered."""

    def __init__(self, args, trainer):
        self.args, self.trainer, self.weight_version, self.rollout_engines = args, trainer, 0, []

    def connect_rollout_engines(self, engines, lock, **_of_engines):
        self.rollout_engines = engines

    def update_weights(self):
        self.weight_version += 1
        folder = Path(self.args.update_weight_disk_dir) / f"weight_v{self.weight_version:06d}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        self.trainer.export(folder)


class MegatronTrainRayActor(TrainRayActor):
    def init(self, args, role, with_ref=False, with_opd_teacher=False):
        self.args, self.role = args, role
        if args.debug_rollout_only:
            return 0
        if args.update_weight_mode != "full":
            raise ValueError("the stand-in sends weights only in --update-weight-mode full")
        from slime.utils.distributed_utils import init_gloo_group
        from trainer import Trainer

        dist.init_process_group("gloo", timeout=timedelta(minutes=args.distributed_timeout_minutes))
        args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
        init_gloo_group()
        self.trainer = Trainer(args, role)
        if args.update_weight_transport == "disk":
            self.weight_updater = ToDisk(args, self.trainer)
        else:
            import weights_over_gloo

            self.weight_updater = weights_over_gloo.updater(args, self.trainer.model)
        self.weight_updater.weight_version = getattr(args, "update_weight_start_version", 0)
        self.train_parallel_config = self._get_parallel_config()
        return self.trainer.load()

    def _get_parallel_config(self):
        import layout

        return layout.parallel_config()

    def train(self, rollout_id, rollout_data_ref, external_data=None):
        if self.args.debug_rollout_only:
            return None
        import layout
        from slime.utils.data import process_rollout_data

        self._probe()
        data = process_rollout_data(self.args, rollout_data_ref, *layout.data_parallel())
        values = self.trainer.train(rollout_id, data, (external_data or {}).get("values"))
        save_debug_train_data(self.args, rollout_id=rollout_id, rollout_data=data)
        return {"values": values} if self.role == "critic" else None

    def _probe(self):
        """Before the first step after an update: only now have the engines loaded what update_weights wrote."""
        asked = os.environ.get("SLIME_CPU_PROBE") == "1"  # else the engines are let alone: one may have died since
        if asked and not self.args.debug_train_only and self.args.update_weights_interval == 1:
            urls = ray.get([engine.get_url.remote() for engine in self.weight_updater.rollout_engines])
            self.trainer.probe(urls, version=self.weight_updater.weight_version)

    def save_model(self, rollout_id, force_sync=False):
        if not self.args.debug_rollout_only:
            self.trainer.save(rollout_id)

    def update_weights(self):
        if self.args.debug_train_only or self.args.debug_rollout_only:
            return
        if self.args.use_fault_tolerance:
            if dist.get_rank() == 0:
                ray.get(self.rollout_manager.recover_updatable_engines.remote())
            dist.barrier()
        engines, lock, num_new, counts, *_ = ray.get(self.rollout_manager.get_updatable_engines_and_lock.remote())
        if not engines:
            return
        if num_new > 0:
            self.weight_updater.connect_rollout_engines(engines, lock, engine_gpu_counts=counts)
            dist.barrier()
            if dist.get_rank() == 0:
                ray.get(self.rollout_manager.clear_updatable_num_new_engines.remote())
        self.weight_updater.update_weights()

    def sleep(self, *args): ...
    def wake_up(self, *args): ...
    def clear_memory(self): ...
