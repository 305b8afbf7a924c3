"""Stands for slime's MegatronTrainRayActor at v0.3.1: learns on the CPU, updates weights by slime's disk transport.

Run it with `--update-weight-transport disk --update-weight-mode full --update-weight-disk-dir DIR`: this actor writes
DIR/weight_vNNNNNN as slime's UpdateWeightFromDisk does, and slime's own RayTrainGroup makes the engines load it.
"""

import os
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import ray
import torch.distributed as dist
from slime.ray.train_actor import TrainRayActor


class MegatronTrainRayActor(TrainRayActor):
    def init(self, args, role, with_ref=False, with_opd_teacher=False):
        self.args, self.role = args, role
        if args.debug_rollout_only:
            return 0
        if (args.update_weight_mode, args.update_weight_transport) != ("full", "disk"):
            raise ValueError("the stand-in sends weights only by --update-weight-transport disk, in mode full")
        from trainer import Trainer

        dist.init_process_group("gloo", timeout=timedelta(minutes=args.distributed_timeout_minutes))
        args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
        start = getattr(args, "update_weight_start_version", 0)
        self.weight_updater = SimpleNamespace(weight_version=start, rollout_engines=[])
        self.trainer = Trainer(args, role)
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
        engines, _lock, num_new, *_ = ray.get(self.rollout_manager.get_updatable_engines_and_lock.remote())
        if not engines:
            return
        if num_new > 0:
            self.weight_updater.rollout_engines = engines
            dist.barrier()
            if dist.get_rank() == 0:
                ray.get(self.rollout_manager.clear_updatable_num_new_engines.remote())
        self.weight_updater.weight_version += 1
        folder = Path(self.args.update_weight_disk_dir) / f"weight_v{self.weight_updater.weight_version:06d}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        self.trainer.export(folder)

    def sleep(self, *args): ...
    def wake_up(self, *args): ...
    def clear_memory(self): ...
